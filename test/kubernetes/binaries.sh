#!/usr/bin/env bash
# Puts the programs of a Kubernetes cluster into a cache outside the checkout and prints that folder: kube-apiserver, kubelet,
# kube-controller-manager, kube-scheduler, kube-proxy, kubectl, CoreDNS and helm are built from their Go modules (no release download is needed),
# about ten minutes on two cores the first time. What is cached at the wanted version is not built again.
# `binaries.sh --cached` only looks: exit code 1 and the missing names on standard error where something is not built yet.
set -euo pipefail

KUBERNETES=1.36.1
HELM=3.18.4
COREDNS=1.14.4
cache=${EBBTIDE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ebbtide}/kubernetes-$KUBERNETES-helm-$HELM
programs=(kube-apiserver kubelet kube-controller-manager kube-scheduler kube-proxy kubectl coredns helm)

say() { printf 'binaries: %s\n' "$*" >&2; }

missing=()
look() {
  missing=()
  local program
  for program in "${programs[@]}"; do
    [ -f "$cache/$program" ] || missing+=("$program")
  done
}
look
if [ ${#missing[@]} = 0 ]; then
  printf '%s\n' "$cache"
  exit 0
fi
if [ "${1:-}" = --cached ]; then
  say "not built yet: ${missing[*]}"
  exit 1
fi
if ! command -v go >/dev/null; then
  say "go is missing (1.25 or newer), which builds ${missing[*]}: apt-get install golang-go, or from your distribution"
  exit 1
fi

mkdir -p "$cache"
# Two runs at once would build everything twice: the second waits for the first.
exec 9>"$cache/.lock"
flock 9
look
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
export GOFLAGS=-mod=mod CGO_ENABLED=0 GOTOOLCHAIN=local

# One module that requires Kubernetes and every staging module it names, at the matching version.
kubernetes_module() {
  mkdir -p "$work/kubernetes"
  cd "$work/kubernetes"
  if [ -f go.mod ]; then return; fi
  local staging minor=0.${KUBERNETES#1.} module
  printf 'module ebbtide.invalid/kubernetes\n\ngo 1.25.0\n\nrequire k8s.io/kubernetes v%s\n' $KUBERNETES >go.mod
  staging=$(go mod download -json "k8s.io/kubernetes@v$KUBERNETES" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
  {
    printf '\nrequire (\n'
    sed -n 's|^[[:space:]]*\(k8s.io/[a-z-]*\) v0.*|\1|p' "$staging" |
      grep -v -e sample- -e code-generator -e k8s.io/utils -e k8s.io/klog -e kube-openapi -e gengo -e system-validators -e mount-utils |
      sort -u | while read -r module; do printf '\t%s v%s\n' "$module" "$minor"; done
    printf '\tk8s.io/mount-utils v%s\n)\n' "$minor"
    printf '\nreplace (\n'
    sed -n 's|^[[:space:]]*\(k8s.io/[a-z-]*\) => ./staging.*|\1|p' "$staging" |
      grep -v -e sample- -e code-generator | sort -u |
      while read -r module; do printf '\t%s => %s v%s\n' "$module" "$module" "$minor"; done
    printf ')\n'
  } >>go.mod
}

# A module of its own that requires one other: "PATH vVERSION".
module_of() {
  rm -rf "$work/module"
  mkdir -p "$work/module"
  cd "$work/module"
  printf 'module ebbtide.invalid/module\n\ngo 1.25.0\n\nrequire %s\n' "$1" >go.mod
}

build() {
  local program=$1 started=$SECONDS package=$2
  shift 2
  say "building $program ..."
  go build -ldflags "-s -w $*" -o "$work/$program" "$package" 2>"$work/$program.log" || {
    tail -n 30 "$work/$program.log" >&2
    say "building $program failed"
    exit 1
  }
  mv "$work/$program" "$cache/$program"
  say "$program is built, $((SECONDS - started)) s"
}

version=k8s.io/component-base/version
for program in "${missing[@]}"; do
  case $program in
  helm)
    module_of "helm.sh/helm/v3 v$HELM"
    build helm helm.sh/helm/v3/cmd/helm "-X helm.sh/helm/v3/internal/version.version=v$HELM"
    ;;
  coredns)
    module_of "github.com/coredns/coredns v$COREDNS"
    build coredns github.com/coredns/coredns
    ;;
  *)
    kubernetes_module
    build "$program" "k8s.io/kubernetes/cmd/$program" "-X $version.gitVersion=v$KUBERNETES" \
      "-X $version.gitMajor=1 -X $version.gitMinor=36 -X $version.gitTreeState=clean"
    ;;
  esac
done
printf '%s\n' "$cache"
