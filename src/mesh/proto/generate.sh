#!/usr/bin/env bash
# Generates src/mesh/proto/generated.{js,d.ts} (static protobufjs code) and copies the JS beside tsc's output.
# Nothing generated is committed: the .proto files are the source.
set -euo pipefail
cd "$(dirname "$0")"
repo=../../..
export PATH="$PWD/$repo/node_modules/.bin:$PATH"
if [ generated.js -nt workload.proto ] && [ generated.js -nt authorization.proto ] && [ generated.js -nt discovery.proto ] \
  && [ generated.js -nt zds.proto ] && [ generated.js -nt ca.proto ] && [ -f generated.d.ts ]; then
  mkdir -p "$repo/dist/mesh/proto" && cp generated.js "$repo/dist/mesh/proto/"
  exit 0
fi
pbjs -t static-module -w es6 --es6 --force-number --no-verify --no-delimited \
  -p . -o generated.js zds.proto workload.proto authorization.proto discovery.proto ca.proto
pbts -o generated.d.ts generated.js
mkdir -p "$repo/dist/mesh/proto" && cp generated.js "$repo/dist/mesh/proto/"
