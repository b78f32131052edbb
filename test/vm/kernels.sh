#!/usr/bin/env bash
# Puts one of Debian's cloud kernels into a cache outside the checkout and prints its folder: vmlinuz, release (a file with
# `uname -r`), modules.img (its modules, as /usr/lib/modules). Nothing is installed, and apt's own sources and lists are not
# touched: it is asked with a folder of its own for each suite.
#   kernels.sh NAME           6.1, 6.12 or newest
#   kernels.sh --cached NAME  only looks: exit code 1 where it would have to be downloaded
set -euo pipefail

declare -A SUITES=([6.1]=bookworm [6.12]=trixie [newest]=sid)
# The package whose only content is its dependency on the suite's newest kernel.
META=linux-image-cloud-amd64

say() { printf 'kernels: %s\n' "$*" >&2; }

look=
if [ "${1:-}" = --cached ]; then
  look=1
  shift
fi
name=${1:-}
suite=${SUITES[$name]:-}
if [ -z "$suite" ]; then
  say "no kernel '$name'; there are: ${!SUITES[*]}"
  exit 2
fi
cache=${EBBTIDE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ebbtide}/vm/kernels
folder=$cache/$suite
if [ -e "$folder/release" ]; then
  printf '%s\n' "$folder"
  exit 0
fi
if [ -n "$look" ]; then
  say "kernel $name is not downloaded yet"
  exit 1
fi

mkdir -p "$cache"
# Two runs at once would download everything twice: the second waits for the first.
exec 9>"$cache/.lock-$suite"
flock 9
if [ -e "$folder/release" ]; then
  printf '%s\n' "$folder"
  exit 0
fi
work=$(mktemp -d "$cache/.$suite.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The archive that this machine has its Debian packages from.
archive=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
  awk '$1 == "Debian" && $2 !~ /-/ { print $3; exit }')
if [ -z "$archive" ]; then
  say "apt knows no archive of Debian on this machine: apt-get update, and look into /etc/apt"
  exit 1
fi
mkdir -p "$work"/apt/{lists/partial,archives/partial,preferences.d}
chmod 755 "$work"
printf 'deb [arch=amd64] %s %s main\n' "$archive" "$suite" >"$work/apt/sources.list"
: >"$work/apt/status"
apt=(-q -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o "Dir::Etc::preferencesparts=$work/apt/preferences.d" -o Dir::Etc::preferences=/dev/null
  -o "Dir::State::lists=$work/apt/lists" -o "Dir::State::status=$work/apt/status"
  -o "Dir::Cache=$work/apt" -o Acquire::Languages=none -o APT::Sandbox::User=root)

run() {
  if ! "$@" >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    say "failed: $*"
    exit 1
  fi
}
say "asking for the newest kernel of $suite ..."
run apt-get "${apt[@]}" update
package=$(apt-cache "${apt[@]}" show "$META" | sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p' | sort -V | tail -n 1)
if [ -z "$package" ]; then
  say "$suite has no $META"
  exit 1
fi
say "downloading $package ..."
mkdir "$work/debs" "$work/files"
cd "$work/debs"
run apt-get "${apt[@]}" download "$package"
# In newer releases a kernel comes in several packages.
for dependency in $(apt-cache "${apt[@]}" show "$package" | sed -n 's/^Depends: //p' | tr ',|' '\n\n' |
  sed -n 's/^ *\(linux-\(modules\|binary\|base\)-[0-9][^ ]*\).*/\1/p' | sort -u); do
  run apt-get "${apt[@]}" download "$dependency"
done
for deb in *.deb; do run dpkg-deb -x "$deb" "$work/files"; done

# Newer packages have the kernel beside its modules.
kernel=$(find "$work/files" -type f \( -name 'vmlinuz-*' -o -name vmlinuz \) | head -n 1)
modules=$(find "$work/files" -type d -path '*/lib/modules/*' -prune | head -n 1)
release=${modules##*/}
if [ -z "$kernel" ] || [ -z "$modules" ]; then
  say "$package holds no kernel with modules"
  exit 1
fi
mkdir -p "$work/root/lib/modules" "$work/result/modules"
mv "$kernel" "$work/result/vmlinuz"
mv "$modules" "$work/root/lib/modules/$release"
run depmod -b "$work/root" "$release"
size=$(($(du -sm "$work/root/lib/modules" | cut -f 1) * 5 / 4 + 32))
run mke2fs -q -t ext4 -O '^has_journal' -m 0 -N 40000 -d "$work/root/lib/modules" "$work/result/modules.img" "${size}M"
# The few that the initial memory disk needs are read from here.
mv "$work/root/lib/modules/$release" "$work/result/modules/$release"
printf '%s\n' "$release" >"$work/result/release"
rm -rf "$folder"
mv "$work/result" "$folder"
say "kernel $name is $release"
printf '%s\n' "$folder"
