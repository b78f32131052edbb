#!/usr/bin/env bash
# Makes the machine ready for the VM tests: Debian packages by name. `prepare.sh --look` only looks: exit code 1 and what is
# missing on standard error.
set -euo pipefail

PACKAGES=(qemu-system-x86 e2fsprogs kmod xz-utils gcc libc6-dev iptables iproute2 nftables util-linux procps)

say() { printf 'prepare: %s\n' "$*" >&2; }

if [ "$(uname -m)" != x86_64 ]; then
  say "the VM tests run on x86_64 only; this is $(uname -m)"
  exit 1
fi
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "the VM tests build their guests from Debian packages of this machine and get kernels with apt; it has neither"
  exit 1
fi
absent=()
installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${PACKAGES[@]}" 2>/dev/null | sed -n 's/^installed //p') || true
for package in "${PACKAGES[@]}"; do
  grep -qxF "$package" <<<"$installed" || absent+=("$package")
done
if [ ${#absent[@]} = 0 ]; then exit 0; fi
if [ "${1:-}" = --look ]; then
  say "not installed: ${absent[*]}"
  exit 1
fi
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
