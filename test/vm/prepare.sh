#!/usr/bin/env bash
# Makes the machine ready for the VM tests: Debian packages by name. `prepare.sh --look` only looks whether tests can run:
# exit code 1 and on standard error why not.
set -euo pipefail
here=$(dirname "$0")
stage=prepare
. "$here/../../.ci/packages.sh"

if [ "$(uname -m)" != x86_64 ]; then
  say "the VM tests run on x86_64 only; this is $(uname -m)"
  exit 1
fi
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "guests are built from this machine's own Debian packages, and their kernels come by apt; it has neither"
  exit 1
fi
if [ "${1:-}" = --look ]; then exit 0; fi
install_packages qemu-system-x86_64 qemu-system-x86 e2fsprogs kmod xz-utils gcc libc6-dev iptables nftables iproute2 \
  util-linux procps psmisc python3 systemd apparmor containerd runc
