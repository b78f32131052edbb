#!/usr/bin/env bash
# Writes base/ and crds/ from the chart, with its default values: run it when the chart has changed.
#   generate.sh [DIRECTORY]      (default: where it is; helm by env HELM, else on PATH)
set -euo pipefail
here=$(realpath "$(dirname "$0")")
out=${1:-$here}
helm=${HELM:-helm}
if ! command -v "$helm" >/dev/null; then
  printf 'generate: no helm; put it on PATH, or name it: HELM=/path/to/helm %s\n' "$0" >&2
  exit 1
fi
mkdir -p "$out/base" "$out/crds"
{
  printf '# Written by daemonset/kustomize/generate.sh from daemonset/chart. Change the chart, not this file.\n'
  # The oldest Kubernetes that the chart is for: nothing here depends on a newer one.
  "$helm" template ebbtide "$here/../chart" --namespace ebbtide-system --kube-version 1.30.0 --no-hooks |
    sed -e '/^# Source: /d' -e 's|app.kubernetes.io/managed-by: Helm|app.kubernetes.io/managed-by: kustomize|'
} >"$out/base/ebbtide.yaml"
for file in "$here"/../chart/crds/*.yaml; do cp "$file" "$out/crds/"; done
