#!/usr/bin/env bash
# Makes the machine ready for the cluster tests: Debian packages by name, and the programs of the cluster (binaries.sh).
set -euo pipefail
here=$(dirname "$0")

PACKAGES=(etcd-server containerd runc containernetworking-plugins nftables openssl curl gcc libc6-dev python3)

say() { printf 'prepare: %s\n' "$*" >&2; }

absent=()
if command -v dpkg-query >/dev/null; then
  installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${PACKAGES[@]}" 2>/dev/null | sed -n 's/^installed //p') || true
  for package in "${PACKAGES[@]}"; do
    grep -qxF "$package" <<<"$installed" || absent+=("$package")
  done
else
  for program in etcd containerd runc nft openssl curl gcc python3; do
    command -v "$program" >/dev/null || absent+=("$program")
  done
  if [ ${#absent[@]} -gt 0 ]; then
    say "no apt here, and these programs are missing: ${absent[*]}"
    exit 1
  fi
fi
if [ ${#absent[@]} -gt 0 ]; then
  say "installing ${absent[*]}"
  # Debian starts a service when its package is installed; this tells it not to. Removed again in every case.
  guard=/usr/sbin/policy-rc.d
  if [ ! -e $guard ]; then
    printf '#!/bin/sh\nexit 101\n' >$guard
    chmod 755 $guard
    trap 'rm -f $guard' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${absent[@]}"; } >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    say "could not install ${absent[*]}"
    exit 1
  fi
  rm -f "$log"
fi
bash "$here/binaries.sh" >/dev/null
