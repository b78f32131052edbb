#!/usr/bin/env bash
# Builds daemonset/Dockerfile for real, from a clean clone of what is committed, and compares its image with the one that
# daemonset/image/build.sh makes of this checkout; then runs it. No container engine and no image registry are needed:
# buildah builds, and the base image is made here of Debian's packages and npm's Node, smaller than the one it stands for,
# so that what the Dockerfile takes from its base without saying so is found missing. Five minutes; leaves nothing behind.
#   try-dockerfile.sh [--keep]      (--keep: leave storage and images, and say where)
set -euo pipefail
here=$(realpath "$(dirname "$0")")
checkout=$(realpath "$here/../..")
stage=image
. "$checkout/.ci/packages.sh"
. "$here/stand-in-base.sh"

keep=
if [ "${1:-}" = --keep ]; then keep=1; fi
fail() {
  say "FAILED: $*"
  exit 1
}
if [ "$(uname -m)" != x86_64 ]; then fail "the Dockerfile is for amd64; this is $(uname -m)"; fi
if [ "$(id -u)" != 0 ]; then fail "this needs root, for chroot: run it in a root shell (sudo -i)"; fi
if [ ! -e "$checkout/dist/main.js" ]; then fail "the checkout is not built: bash .ci/setup"; fi
install_packages 'buildah debootstrap git' buildah debootstrap git
if [ -n "$(git -C "$checkout" status --porcelain -- . ':!test')" ]; then
  say "the checkout has changes that are not committed: the clone that is built has them not"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/ebbtide-image.XXXXXX")
# Each command that takes long is a process group of its own, to be ended whole.
set -m
clean() {
  local code=$? pid
  trap '' INT TERM
  trap - EXIT
  for pid in $(jobs -pr); do kill -TERM -- "-$pid" 2>/dev/null || true; done
  wait
  # Whoever was interrupted may have left mounts of a chroot below.
  awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n 1 umount -l
  if [ -n "$keep" ]; then
    say "kept: $work"
  else
    rm -rf "$work"
  fi
  if [ $code -ne 0 ]; then printf '0 passed, 1 failed\n'; fi
  exit $code
}
trap clean EXIT
trap 'exit 130' INT TERM

# Neither the machine's storage nor its settings are used.
mkdir "$work/settings"
printf 'unqualified-search-registries = []\n' >"$work/settings/registries.conf"
printf '[storage]\ndriver = "vfs"\nrunroot = "%s"\ngraphroot = "%s"\n' "$work/run" "$work/storage" >"$work/settings/storage.conf"
printf '[engine]\n[network]\n' >"$work/settings/containers.conf"
export CONTAINERS_STORAGE_CONF=$work/settings/storage.conf CONTAINERS_REGISTRIES_CONF=$work/settings/registries.conf
export CONTAINERS_CONF=$work/settings/containers.conf BUILDAH_ISOLATION=chroot
export TMPDIR=$work
umask 022

version=$(sed -n 's/^  "version": "\(.*\)",/\1/p' "$checkout/package.json")
dockerfile=daemonset/Dockerfile
base=$(sed -n 's/^ARG BASE=//p' "$checkout/$dockerfile")

long "cloning what is committed" git clone -q --no-local "$checkout" "$work/clone"
make_base "$checkout" "$work" "$base"

# What a checkout has beside what is committed must not get into the build, whatever it is.
for each in node_modules dist native/build bpf/build daemonset/image/build; do
  mkdir -p "$work/clone/$each"
  printf 'of another machine\n' >"$work/clone/$each/stray"
done
mv "$work/clone/daemonset/image/build/stray" "$work/clone/daemonset/image/build/image.tar"
printf 'FROM scratch\nCOPY . /\n' >"$work/context.Dockerfile"
long "looking at the context" buildah build -q --ignorefile "$work/clone/$dockerfile.dockerignore" -f "$work/context.Dockerfile" \
  -t context "$work/clone"
container=$(buildah from --pull-never context)
context=$(buildah mount "$container")
strays=$(grep -rlx 'of another machine' "$context" || true)
if [ -n "$strays" ] || [ -e "$context/.git" ]; then fail "in the build's context: ${strays:-.git}"; fi
kilobytes=$(du -sk --apparent-size "$context" | cut -f 1)
say "context: $(find "$context" -type f | wc -l) files, $kilobytes kB"
if [ "$kilobytes" -gt 20480 ]; then fail "the context is too large: see $dockerfile.dockerignore"; fi
buildah rm "$container" >/dev/null

long "building $dockerfile" buildah build --pull-never --layers=false --network host \
  --build-arg "REVISION=$(git -C "$checkout" rev-parse HEAD)" \
  --ignorefile "$work/clone/$dockerfile.dockerignore" -f "$work/clone/$dockerfile" -t "ebbtide:$version" "$work/clone"
mkdir "$work/made" "$work/other"
long "writing it to a file" buildah push -q "ebbtide:$version" "docker-archive:$work/made.tar:ebbtide:$version"
long "building the same with daemonset/image/build.sh" bash "$checkout/daemonset/image/build.sh" -t "ebbtide:$version" -o "$work/other.tar"

long "comparing them" bash "$here/compare-images.sh" "$work/made.tar" "$work/other.tar" "$work/differences" || {
  cat "$work/differences" >&2 || true
  fail "the images differ"
}
cat "$work/differences"

container=$(buildah from --pull-never "ebbtide:$version")
bash "$here/run-image.sh" "$container" "$version" || fail "the image does not run as it should"
say "done after $SECONDS s"
printf '1 passed, 0 failed\n'
