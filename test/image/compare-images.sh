#!/usr/bin/env bash
# compare-images.sh ONE OTHER REPORT: compares two images (docker-archive files) by their settings and, file by file, by kind,
# mode, owner, size and content. Times are not compared: a container engine's are its own. Fails where they differ in more
# than versions of Debian's packages; REPORT has what was found.
set -euo pipefail
export LC_ALL=C
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
report=$3

# unpack FILE NAME: root, list and settings of an image.
unpack() {
  local at=$work/$2 layer
  mkdir -p "$at/archive" "$at/root"
  tar -C "$at/archive" -xf "$1"
  node -e '
    const { readFileSync, writeFileSync } = require("node:fs");
    const at = process.argv[1];
    const [{ Config, Layers }] = JSON.parse(readFileSync(`${at}/archive/manifest.json`, "utf8"));
    const { architecture, os, config } = JSON.parse(readFileSync(`${at}/archive/${Config}`, "utf8"));
    const { User, WorkingDir, Entrypoint, Cmd, Env, Labels } = config;
    const labels = Object.entries(Labels).filter(([name]) => !/^io\.buildah|\.(created)$/.test(name)).sort();
    const settings = { architecture, os, User, WorkingDir, Entrypoint, Cmd, Env: [...Env].sort(), labels };
    writeFileSync(`${at}/settings`, `${JSON.stringify(settings, null, 1)}\n`);
    writeFileSync(`${at}/layers`, Layers.map((each) => `${each}\n`).join(""));' "$at"
  while read -r layer; do
    tar -C "$at/root" --numeric-owner -xpf "$at/archive/$layer"
  done <"$at/layers"
  (
    cd "$at/root"
    find . -mindepth 1 ! -type f -printf '%p\t%y %m %U:%G %l\n' | sort
    join -t $'\t' <(find . -type f -printf '%p\t%y %m %U:%G %s\n' | sort -t $'\t' -k 1,1) \
      <(find . -type f -print0 | xargs -0 sha256sum | sed 's/^\([^ ]*\)  \(.*\)$/\2\t\1/' | sort -t $'\t' -k 1,1)
  ) >"$at/list"
}
unpack "$1" one
unpack "$2" other

verdict=0
{
  printf 'files: %s and %s; size: %s MB and %s MB; settings: ' "$(wc -l <"$work/one/list")" "$(wc -l <"$work/other/list")" \
    "$(du -sm --apparent-size "$work/one/root" | cut -f 1)" "$(du -sm --apparent-size "$work/other/root" | cut -f 1)"
  if diff -u "$work/one/settings" "$work/other/settings"; then printf 'the same\n'; else verdict=1; fi
  diff "$work/one/list" "$work/other/list" >"$work/differences" || true
  sed -n 's/^[<>] //p' "$work/differences" | cut -f 1 | sort -u >"$work/paths"
  printf 'files that differ: %s\n' "$(wc -l <"$work/paths")"
  cat "$work/differences"
  # With other versions of Debian's packages their files are others, what is linked to them, and the list of parts.
  allowed='^$'
  if diff -r "$work/one/root/var/lib/dpkg/status.d" "$work/other/root/var/lib/dpkg/status.d" >"$work/versions"; then
    :
  else
    printf "versions of Debian's packages differ:\n"
    grep -E '^[<>] Version' "$work/versions" || true
    allowed='^\./(lib|lib64|usr/lib|usr/share/doc|var/lib/dpkg|opt/ebbtide/native/build/Release)/'
  fi
  if grep -qvE "$allowed" "$work/paths"; then verdict=1; fi
} >"$report"
exit $verdict
