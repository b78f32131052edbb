#!/usr/bin/env bash
# sbom.sh CHECKOUT PACKAGE...: prints what the image is made of as SPDX 2.3: the npm packages (npm sbom), the Node that runs
# them, and the Debian packages of the shared libraries. The same for the same input: its time is SOURCE_DATE_EPOCH.
set -euo pipefail
checkout=$1
shift

debian=$(dpkg-query -W -f='${Package}\t${Version}\t${Architecture}\t${source:Package}\t${source:Version}\n' "$@")
cd "$checkout"
npm sbom --sbom-format spdx --omit dev --package-lock-only | DEBIAN=$debian node -e '
  const { createHash } = require("node:crypto");
  const { readFileSync } = require("node:fs");
  const document = JSON.parse(readFileSync(0, "utf8"));
  const add = (name, version, purl, text) => {
    const id = `SPDXRef-Package-${name}-${version}`.replace(/[^A-Za-z0-9.-]/g, ".");
    document.packages.push({
      name, SPDXID: id, versionInfo: version, downloadLocation: "NOASSERTION", filesAnalyzed: false,
      ...(text === undefined ? {} : { comment: text }),
      externalRefs: [{ referenceCategory: "PACKAGE-MANAGER", referenceType: "purl", referenceLocator: purl }],
    });
    document.relationships.push({
      spdxElementId: document.documentDescribes[0], relatedSpdxElement: id, relationshipType: "DEPENDS_ON",
    });
  };
  const { node, openssl, nghttp2, v8, uv, zlib } = process.versions;
  add("node", node, `pkg:generic/node@${node}`, `with openssl ${openssl}, nghttp2 ${nghttp2}, v8 ${v8}, uv ${uv}, zlib ${zlib}`);
  for (const line of process.env.DEBIAN.split("\n").filter(Boolean)) {
    const [name, version, arch, source, sourceVersion] = line.split("\t");
    add(name, version, `pkg:deb/debian/${name}@${encodeURIComponent(version)}?arch=${arch}`, `built from ${source} ${sourceVersion}`);
  }
  document.packages.sort((a, b) => (a.SPDXID < b.SPDXID ? -1 : 1));
  document.creationInfo = {
    created: new Date(Number(process.env.SOURCE_DATE_EPOCH ?? 0) * 1000).toISOString().replace(/\.\d+/, ""),
    creators: document.creationInfo.creators,
  };
  document.documentNamespace = "";
  const hash = createHash("sha256").update(JSON.stringify(document)).digest("hex");
  document.documentNamespace = `https://spdx.org/spdxdocs/ebbtide-${hash}`;
  process.stdout.write(`${JSON.stringify(document, null, 1)}\n`);'
