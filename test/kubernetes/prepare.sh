#!/usr/bin/env bash
# Makes the machine ready for the cluster tests: Debian packages by name, and the programs of the cluster (binaries.sh).
set -euo pipefail
here=$(dirname "$0")
stage=prepare
. "$here/../../.ci/packages.sh"

install_packages 'etcd containerd runc nft openssl curl gcc python3' \
  etcd-server containerd runc containernetworking-plugins nftables openssl curl gcc libc6-dev python3
bash "$here/binaries.sh" >/dev/null
