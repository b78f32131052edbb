#!/usr/bin/env bash
# run-image.sh CONTAINER VERSION: runs what is in a container that buildah has (with its settings: user, directory,
# environment) and looks at its files. Says each thing that was seen; fails at the first that is not as it should be.
set -euo pipefail
container=$1
version=$2
root=$(buildah mount "$container")
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

seen() { printf 'image: %s\n' "$*"; }
wrong() {
  printf 'image: WRONG: %s\n' "$*" >&2
  cat "$errors" >&2
  exit 1
}
# in_image [OPTION]... -- ARGUMENT...: as the entry point would be run.
in_image() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  buildah run "${options[@]}" "$container" -- /usr/local/bin/node "$@" 2>"$errors"
}

# First the files: to run something puts its own into /etc.
programs=$(find "$root" -xdev -type f -perm /111 ! -name '*.so*' ! -name '*.node' -printf '%P\n' | LC_ALL=C sort)
expected=$'opt/ebbtide/dist/main.js\nopt/ebbtide/native/build/Release/ebbtide-boot-guard\nusr/local/bin/node'
others=$(grep -vxF "$expected" <<<"$programs" | grep -v '^opt/ebbtide/node_modules/' || true)
[ -z "$others" ] || wrong "executable files nobody expected: $others"
for name in sh bash dash ash busybox env apt dpkg npm perl python3; do
  found=$(find "$root" -xdev -name "$name" ! -type d -printf '%P ')
  [ -z "$found" ] || wrong "there is $found"
done
[ -z "$(find "$root" -xdev -perm /7000 ! -path "$root/tmp" ! -type l)" ] || wrong "files with set-user-ID or the like"
[ -z "$(find "$root" -xdev \( -perm -o+w -o ! -user 0 \) ! -type l ! -path "$root/tmp")" ] ||
  wrong "files that are not root's or that everybody may write"
seen "no shell, no package manager; programs: $(tr '\n' ' ' <<<"$expected")"

node -e '
  const { readdirSync, readFileSync } = require("node:fs");
  const root = process.argv[1];
  const { spdxVersion, packages } = JSON.parse(readFileSync(`${root}/usr/share/doc/ebbtide/sbom.spdx.json`, "utf8"));
  const listed = new Set(packages.map(({ name }) => name));
  const scoped = (name) => (name.startsWith("@") ? readdirSync(`${root}/opt/ebbtide/node_modules/${name}`).map((each) => `${name}/${each}`) : [name]);
  const there = [
    ...readdirSync(`${root}/opt/ebbtide/node_modules`).filter((each) => !each.startsWith(".")).flatMap(scoped),
    ...readdirSync(`${root}/var/lib/dpkg/status.d`), "node", "ebbtide",
  ];
  const missing = there.filter((each) => !listed.has(each));
  if (spdxVersion !== "SPDX-2.3" || missing.length > 0 || packages.some(({ versionInfo }) => !versionInfo)) {
    process.stderr.write(`missing: ${missing.join(", ")}\n`);
    process.exit(1);
  }
  process.stdout.write(`image: list of parts: ${packages.length}, with each package that is in the image\n`);' "$root" 2>"$errors" ||
  wrong "the list of parts is not whole"

said=$(in_image -- dist/main.js --version) || wrong "--version ended with $?"
[ "$said" = "$version" ] || wrong "--version says '$said', not $version"
seen "--version: $said"
for command in '' agent proxy controller check status uninstall boot-guard; do
  said=$(in_image -- dist/main.js $command --help) || wrong "$command --help ended with $?"
  grep -q "^Usage: ebbtide ${command:-\[}" <<<"$said" || wrong "$command --help says: $said"
done
seen "--help: of the program and of each command"
said=$(in_image -- -p 'JSON.stringify([process.getuid(), process.getgid(), process.cwd(), process.env.NODE_ENV])') || wrong "node does not run"
[ "$said" = '[65532,65532,"/opt/ebbtide","production"]' ] || wrong "user, group, directory and NODE_ENV are $said"
in_image -- -e 'for (const name of ["capture", "engine", "seqpacket"]) require(`/opt/ebbtide/native/build/Release/${name}.node`)' ||
  wrong "an addon cannot be loaded"
seen "user, directory and environment: $said; every addon is loaded"

# Its findings are the machine's; that it finds is the image's. As the agent is run, and with its capabilities.
rights=(--user 0:0)
for each in BPF NET_ADMIN SYS_ADMIN SYS_PTRACE; do rights+=(--cap-add "CAP_$each"); done
code=0
said=$(in_image "${rights[@]}" -- dist/main.js check --output json) || code=$?
[ $code -le 1 ] || wrong "check ended with $code"
counts=$(node -e '
  const findings = JSON.parse(process.argv[1]);
  const of = (result) => findings.filter((each) => each.result === result).map(({ code }) => code);
  if (!["CAPABILITIES", "BPF_MAPS", "CAPTURE_PROGRAMS", "STEER_PROGRAM"].every((code) => of("ok").includes(code))) process.exit(1);
  process.stdout.write(`${of("ok").length} ok, failed: ${of("failed").join(" ") || "none"}`);' "$said") || wrong "check says: $said"
seen "check: exit code $code, $counts"

# A command that serves until it is told to end.
mkdir -p "$root/tmp/manifests"
buildah run "$container" -- /usr/local/bin/node -e '
  const { spawn } = require("node:child_process");
  const argv = ["dist/main.js", "controller", "--manifests", "/tmp/manifests", "--data", "/tmp/data", "--listen", "127.0.0.1:0"];
  const child = spawn(process.execPath, argv, { stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  setTimeout(() => child.kill("SIGKILL"), 30_000).unref();
  child.stdout.on("data", (text) => {
    said += text;
    if (/listening/.test(said)) child.kill("SIGTERM");
  });
  child.on("exit", (code) => {
    if (code !== 0 || !/listening/.test(said)) process.stderr.write(said);
    process.exit(code === 0 && /listening/.test(said) ? 0 : 1);
  });' 2>"$errors" || wrong "the controller does not start and end"
seen "the controller starts, listens, and ends at SIGTERM"
