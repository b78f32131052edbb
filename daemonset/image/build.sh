#!/usr/bin/env bash
# Builds the image without a container engine: a docker-archive tar from this machine's own Debian and the built checkout.
#   build.sh [-t NAME:TAG] [-o FILE]      (default: ebbtide:VERSION, image.tar beside it in daemonset/image/build)
# The same input makes the same bytes: names sorted, times SOURCE_DATE_EPOCH (default: 0, that is 1970). Prints the path and
# the image's digest (of its configuration). Import it on a node: ctr -n k8s.io images import FILE
set -euo pipefail
here=$(realpath "$(dirname "$0")")
checkout=$(realpath "$here/../..")
version=$(sed -n 's/^  "version": "\(.*\)",/\1/p' "$checkout/package.json")
tag=ebbtide:$version
out=$here/build/image.tar
while getopts t:o: option; do
  case $option in
  t) tag=$OPTARG ;;
  o) out=$OPTARG ;;
  *)
    printf 'usage: build.sh [-t NAME:TAG] [-o FILE]\n' >&2
    exit 2
    ;;
  esac
done
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}
export LC_ALL=C
mkdir -p "$(dirname "$out")"
out=$(realpath -m "$out")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022

bash "$here/rootfs.sh" "$checkout" "$work/base" "$work/app"

pack() {
  tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --hard-dereference --format=gnu "$@"
}
hash_of() { sha256sum "$1" | cut -d' ' -f1; }

mkdir "$work/archive"
layers=()
for part in base app; do
  pack -C "$work/$part" -cf "$work/layer.tar" .
  hash=$(hash_of "$work/layer.tar")
  mv "$work/layer.tar" "$work/archive/$hash.tar"
  layers+=("$hash")
done

created=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
revision=$(git -C "$checkout" rev-parse HEAD 2>/dev/null || printf unknown)
case $(uname -m) in x86_64) architecture=amd64 ;; aarch64) architecture=arm64 ;; *) architecture=$(uname -m) ;; esac
cat >"$work/config.json" <<JSON
{"architecture":"$architecture","os":"linux","created":"$created","config":{"User":"65532:65532","WorkingDir":"/opt/ebbtide","Entrypoint":["/usr/local/bin/node","dist/main.js"],"Cmd":["--help"],"Env":["PATH=/usr/local/bin:/usr/bin:/bin","NODE_ENV=production"],"Labels":{"org.opencontainers.image.title":"Ebbtide","org.opencontainers.image.description":"A service mesh without sidecars","org.opencontainers.image.licenses":"Apache-2.0","org.opencontainers.image.version":"$version","org.opencontainers.image.revision":"$revision","org.opencontainers.image.created":"$created"}},"rootfs":{"type":"layers","diff_ids":["sha256:${layers[0]}","sha256:${layers[1]}"]},"history":[{"created":"$created","created_by":"rootfs.sh base"},{"created":"$created","created_by":"rootfs.sh app"}]}
JSON
config=$(hash_of "$work/config.json")
mv "$work/config.json" "$work/archive/$config.json"
printf '[{"Config":"%s.json","RepoTags":["%s"],"Layers":["%s.tar","%s.tar"]}]\n' "$config" "$tag" "${layers[@]}" \
  >"$work/archive/manifest.json"
pack -C "$work/archive" -cf "$out" manifest.json "$config.json" "${layers[0]}.tar" "${layers[1]}.tar"
printf '%s\n%s sha256:%s\n' "$out" "$tag" "$config"
