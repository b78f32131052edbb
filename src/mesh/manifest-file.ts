/** Reads the text of one manifest file: YAML or JSON, several documents, `kind: List`. Pure. */
import { type Document, isNode, isScalar, LineCounter, parseAllDocuments } from 'yaml';
import { derivedUid } from './kubernetes.js';
import { CHECKS, explainUnread, formatPath, type Path, type Remedy } from './manifest-checks.js';

/** An object of a kind that we read, checked. */
export interface ManifestObject {
  /** `group/Kind`, as in the table of checks. */
  readonly kind: string;
  /** `Kind namespace/name`, or `Kind name` for cluster-wide objects: unique in a cluster. */
  readonly key: string;
  /** Line of the object's beginning, from 1. */
  readonly line: number;
  /** Frozen in depth is not worth its price; nobody writes to it. */
  readonly object: { readonly metadata: { readonly name: string; readonly namespace?: string } };
}

export interface FileProblem {
  /** From 1, where known. */
  readonly line?: number;
  readonly column?: number;
  readonly message: string;
}

/** Either all objects of the file or what is wrong with it: half a file is never taken. */
export type ParsedFile =
  | {
      readonly ok: true;
      readonly objects: readonly ManifestObject[];
      /** What was taken as it was meant, or is of a kind that has no effect. */
      readonly warnings: readonly FileProblem[];
    }
  | { readonly ok: false; readonly problems: readonly [FileProblem, ...FileProblem[]] };

/** Problems beyond this many in one file are not told. */
const MAX_PROBLEMS = 10;
const CLUSTER_WIDE = new Set(['/Namespace', '/Node']);

/** Reads a file's text. Never throws because of the text. */
export function parseManifest(text: string): ParsedFile {
  const reader = new Reader();
  try {
    reader.read(text);
  } catch (error) {
    // The YAML package throws for what it finds only when values are made, such as an alias without an anchor.
    reader.problems.push({ message: error instanceof Error ? error.message : String(error) });
  }
  const [first, ...others] = reader.problems;
  if (first === undefined) {
    return { ok: true, objects: reader.objects, warnings: reader.warnings.slice(0, MAX_PROBLEMS) };
  }
  return { ok: false, problems: [first, ...others.slice(0, MAX_PROBLEMS - 1)] };
}

class Reader {
  readonly problems: FileProblem[] = [];
  readonly warnings: FileProblem[] = [];
  readonly objects: ManifestObject[] = [];
  readonly #lines = new LineCounter();
  readonly #keys = new Map<string, ManifestObject>();

  read(text: string): void {
    if (text.includes('\0')) {
      this.problems.push({ message: 'holds a NUL byte, so it is no YAML' });
      return;
    }
    const parsed = parseAllDocuments(text, { lineCounter: this.#lines, prettyErrors: false });
    // An empty stream comes back as an empty array with extras.
    for (const document of [...parsed] as Document[]) {
      for (const error of document.errors) {
        const { line, col } = this.#lines.linePos(error.pos[0]);
        this.problems.push({ line, column: col, message: error.message });
      }
      if (document.errors.length > 0) continue;
      const value = withoutNulls(document.toJS({ maxAliasCount: 100 }) as unknown);
      if (value === null || value === undefined) continue;
      this.#take(value, document, []);
    }
  }

  #take(value: unknown, document: Document, at: Path): void {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      this.#problem(document, at, 'is no Kubernetes object: not a mapping');
      return;
    }
    const { apiVersion, kind, items } = value as Record<string, unknown>;
    if (typeof apiVersion !== 'string' || typeof kind !== 'string') {
      this.#problem(document, at, 'is no Kubernetes object: apiVersion and kind must be strings');
      return;
    }
    if (kind === 'List' && apiVersion === 'v1') {
      if (items !== undefined && !Array.isArray(items)) this.#problem(document, [...at, 'items'], 'must be a list');
      else
        (items ?? []).forEach((item: unknown, index: number) => {
          this.#take(item, document, [...at, 'items', index]);
        });
      return;
    }
    const group = apiVersion.includes('/') ? apiVersion.slice(0, apiVersion.indexOf('/')) : '';
    const check = Object.hasOwn(CHECKS, `${group}/${kind}`) ? CHECKS[`${group}/${kind}`] : undefined;
    if (check === undefined) {
      const message = explainUnread(group, kind);
      if (message !== undefined) this.warnings.push({ ...this.#position(document, at), message });
      return;
    }
    const before = this.problems.length;
    check(value, [], (path, message, remedy) => {
      const told = `${kind}: ${formatPath(path) || 'object'} ${message}`;
      const meant = remedy === undefined ? undefined : this.#meant(document, [...at, ...path], remedy);
      if (meant === undefined) this.#problem(document, [...at, ...path], told, false);
      else {
        setAt(value, path, meant);
        const position = this.#position(document, [...at, ...path]);
        this.warnings.push({ ...position, message: `${told}; it is taken for ${JSON.stringify(meant)}` });
      }
    });
    if (this.problems.length > before) return;
    this.#add(`${group}/${kind}`, kind, value as Mutable, document, at);
  }

  #add(kind: string, name: string, object: Mutable, document: Document, at: Path): void {
    const { metadata } = object;
    if (CLUSTER_WIDE.has(kind)) delete metadata.namespace;
    const namespace = metadata.namespace ?? 'default';
    if (kind === '/Pod') metadata.uid ??= derivedUid(namespace, metadata.name);
    const key = CLUSTER_WIDE.has(kind) ? `${name} ${metadata.name}` : `${name} ${namespace}/${metadata.name}`;
    const line = this.#position(document, at)?.line ?? 1;
    const earlier = this.#keys.get(key);
    if (earlier !== undefined) {
      if (JSON.stringify(earlier.object) === JSON.stringify(object)) return;
      this.#problem(
        document,
        at,
        `${key} is in this file already, on line ${earlier.line}, and is not the same`,
        false,
      );
      return;
    }
    const entry = { kind, key, line, object };
    this.#keys.set(key, entry);
    this.objects.push(entry);
  }

  /** What was meant by a scalar of the wrong type: 1.10 is "1.10" and never "1.1". */
  #meant(document: Document, at: Path, remedy: Remedy): string | number | undefined {
    const node: unknown = document.getIn(at, true);
    if (!isScalar(node)) return undefined;
    return remedy === 'number' ? Number(node.value) : node.source;
  }

  #problem(document: Document, at: Path, message: string, withPath = true): void {
    const position = this.#position(document, at);
    const path = formatPath(at);
    this.problems.push({ ...position, message: withPath && path !== '' ? `${path} ${message}` : message });
  }

  /** Place of the innermost node that exists on the way to a path. */
  #position(document: Document, at: Path): { line: number; column: number } | undefined {
    for (let length = at.length; length >= 0; length--) {
      const node: unknown = length === 0 ? document.contents : document.getIn(at.slice(0, length), true);
      if (isNode(node) && node.range) {
        const { line, col } = this.#lines.linePos(node.range[0]);
        return { line, column: col };
      }
    }
    return undefined;
  }
}

interface Mutable {
  metadata: { name: string; namespace?: string; uid?: string };
}

/** Replaces what is at a path that is there. */
function setAt(root: unknown, path: Path, value: string | number): void {
  let parent = root as Record<string | number, unknown>;
  for (const step of path.slice(0, -1)) parent = parent[step] as Record<string | number, unknown>;
  const last = path.at(-1);
  if (last !== undefined) parent[last] = value;
}

/** Drops fields that are null, as the API server does; null in a list stays, and is refused by the checks. */
function withoutNulls(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (typeof value !== 'object' || value === null) return value;
  const entries = Object.entries(value).filter(([, entry]) => entry !== null && entry !== undefined);
  return Object.fromEntries(entries.map(([name, entry]) => [name, withoutNulls(entry)]));
}
