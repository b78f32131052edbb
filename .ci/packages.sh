# Sourced by scripts that make the machine ready: progress of long commands, and Debian packages installed by name.
# The sourcing script sets `stage`, the name before each line.

say() { printf '%s: %s\n' "$stage" "$*" >&2; }

# Runs a long command with its output in a file, a dot every few seconds, and the output's end when it fails.
long() {
  local what=$1 log pid
  shift
  log=$(mktemp)
  printf '%s: %s ' "$stage" "$what" >&2
  "$@" >"$log" 2>&1 &
  pid=$!
  local ticks=0
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    ticks=$((ticks + 1))
    if [ $((ticks % 15)) = 0 ]; then printf . >&2; fi
  done
  if wait "$pid"; then
    printf ' done\n' >&2
    rm -f "$log"
  else
    printf ' FAILED: %s\n' "$*" >&2
    tail -n 60 "$log" >&2
    rm -f "$log"
    return 1
  fi
}

# install_packages PROGRAMS PACKAGE...: installs the Debian packages that are missing. Without apt it is another
# distribution: there the PROGRAMS (one word list) have to be found, and what is missing is said.
install_packages() {
  local programs=$1 absent=() name installed
  shift
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    for name in $programs; do
      command -v "$name" >/dev/null || absent+=("$name")
    done
    if [ ${#absent[@]} -gt 0 ]; then
      say "no apt here, and these programs are missing: ${absent[*]}"
      say "install what your distribution calls these Debian packages: $*"
      exit 1
    fi
    return
  fi
  installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p') || true
  for name in "$@"; do
    grep -qxF "$name" <<<"$installed" || absent+=("$name")
  done
  if [ ${#absent[@]} = 0 ]; then return; fi
  say "missing packages: ${absent[*]}"
  # Debian starts a service when its package is installed; this tells it not to. Removed again in every case.
  local guard=/usr/sbin/policy-rc.d
  if [ ! -e $guard ]; then
    printf '#!/bin/sh\nexit 101\n' >$guard
    chmod 755 $guard
    trap "rm -f $guard" EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  long "apt-get update" apt-get -q update
  # What would have to go for it is somebody's: apt says what that is, and installs nothing.
  long "apt-get install" apt-get -q install -y --no-install-recommends --no-remove "${absent[@]}"
  rm -f "$guard"
  trap - EXIT
}
