/** A folder of Kubernetes manifests as the source of objects: read, watched, and never half believed. */
import { closeSync, type FSWatcher, fstatSync, openSync, readFileSync, watch } from 'node:fs';
import { join } from 'node:path';
import type { ObjectSet } from './kubernetes.js';
import type { Logger } from './log.js';
import { type ManifestObject, parseManifest } from './manifest-file.js';
import { type ListedFile, type Listing, listFolder, signatureOf } from './manifest-folder.js';

/** Something wrong with the folder or a file of it; what was read before stays in force. */
export interface ManifestProblem {
  readonly file: string;
  /** Line and column from 1, where known. */
  readonly line?: number;
  readonly column?: number;
  readonly message: string;
}

export interface ManifestListener {
  /** Called with each whole state that differs from the one before. */
  onChange(objects: ObjectSet): void;
  /** Called when a problem appears; see {@link ManifestSource.problems} for those that are there. */
  onProblem?(problem: ManifestProblem): void;
  /** Called when the last problem is gone. */
  onMended?(): void;
}

/** Events are gathered until this long nothing happens, and no longer than the second figure. */
const DEBOUNCE_MS = 30;
const DEBOUNCE_MAX_MS = 500;
/** Watches can be lost and file systems without them exist: everything is looked at again this often. */
const RESCAN_MS = 2000;
/** A file written to more recently than this may be half written: it is looked at again later. */
const SETTLE_MS = 25;
/** Editors replace files by removing them first: a file must be missing this long to be believed gone. */
const MISSING_MS = 60;
const MAX_FILE_BYTES = 32 << 20;

/** A file as it was last believed. */
interface KnownFile {
  /** What was looked at last, good or bad. */
  signature: string;
  objects: readonly ManifestObject[];
  problems: readonly ManifestProblem[];
  missingSince: number | undefined;
}

const FIELDS = {
  '/Namespace': 'namespaces',
  '/Node': 'nodes',
  '/Pod': 'pods',
  '/Service': 'services',
  'discovery.k8s.io/EndpointSlice': 'endpointSlices',
  'security.istio.io/AuthorizationPolicy': 'authorizationPolicies',
  'security.istio.io/PeerAuthentication': 'peerAuthentications',
} as const satisfies Readonly<Record<string, keyof ObjectSet>>;

/**
 * Reads all manifests of a folder and follows its changes. A file with a mistake is reported with its place and its last
 * good state stays; a folder that vanishes, or is replaced by an empty one, leaves everything as it was. Of two files that
 * hold the same object the first by name wins.
 */
export class ManifestSource {
  readonly #directory: string;
  readonly #log: Logger;
  readonly #listener: ManifestListener;
  readonly #files = new Map<string, KnownFile>();
  readonly #watchers = new Map<string, { readonly inode: string; readonly watcher: FSWatcher }>();
  #places = new WeakMap<object, string>();
  #order: readonly object[] = [];
  #problems = new Map<string, ManifestProblem>();
  #rootInode = '';
  #timer: NodeJS.Timeout | undefined;
  #rescan: NodeJS.Timeout | undefined;
  #gatheringSince: number | undefined;
  #watchFailed = false;
  #stopped = false;

  constructor(directory: string, log: Logger, listener: ManifestListener) {
    this.#directory = directory;
    this.#log = log;
    this.#listener = listener;
  }

  /**
   * Reads everything, calls `onChange` with the first state before it returns, and goes on to watch.
   * @throws Error when the folder cannot be read
   */
  start(): void {
    let listing: Listing;
    try {
      listing = listFolder(this.#directory);
    } catch (error) {
      throw new Error(
        `cannot read the folder of manifests: ${(error as Error).message}; name a folder that exists with --manifests`,
      );
    }
    this.#take(listing, true);
    this.#rescan = setInterval(() => this.#scan(), RESCAN_MS);
    // Between listing and watching something may have changed.
    this.#wake();
  }

  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    clearInterval(this.#rescan);
    for (const { watcher } of this.#watchers.values()) watcher.close();
    this.#watchers.clear();
  }

  /** What is wrong now. While this is not empty, an object that is not there may be in a file that cannot be read. */
  problems(): ManifestProblem[] {
    return [...this.#problems.values()];
  }

  /** `FILE:LINE` where an object was read from. */
  locate(object: object): string | undefined {
    return this.#places.get(object);
  }

  #wake(delayMs = DEBOUNCE_MS): void {
    if (this.#stopped) return;
    const now = performance.now();
    this.#gatheringSince ??= now;
    const delay = Math.max(0, Math.min(delayMs, this.#gatheringSince + DEBOUNCE_MAX_MS - now));
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#gatheringSince = undefined;
      this.#scan();
    }, delay);
  }

  #scan(): void {
    let listing: Listing;
    try {
      listing = listFolder(this.#directory);
    } catch (error) {
      this.#closeWatchers();
      this.#report([this.#folderProblem(`cannot be read: ${(error as Error).message}; what was read before stays`)]);
      return;
    }
    if (listing.directories.get('') !== this.#rootInode && listing.files.size === 0 && this.#files.size > 0) {
      this.#watch(listing);
      this.#report([this.#folderProblem('was replaced by one without manifests; what was read before stays')]);
      return;
    }
    this.#take(listing, false);
  }

  #folderProblem(message: string): ManifestProblem {
    return { file: this.#directory, message };
  }

  #take(listing: Listing, first: boolean): void {
    this.#rootInode = listing.directories.get('') ?? '';
    this.#watch(listing);
    for (const file of listing.files.values()) this.#look(file, first);
    for (const [path, known] of this.#files) {
      if (listing.files.has(path) || isWithin(path, listing.unreadable)) known.missingSince = undefined;
      else this.#miss(path, known);
    }
    const problems: ManifestProblem[] = [...listing.unreadable].map(([path, message]) => ({
      file: join(this.#directory, path),
      message,
    }));
    this.#merge(problems, first);
  }

  /** Looks at a file that is there. */
  #look(file: ListedFile, first: boolean): void {
    const known = this.#files.get(file.path);
    if (known?.signature === file.signature) return;
    const age = Date.now() - file.writtenMs;
    if (!first && age >= 0 && age < SETTLE_MS) {
      this.#wake();
      return;
    }
    const name = join(this.#directory, file.path);
    const next = known ?? { signature: '', objects: [], problems: [], missingSince: undefined };
    this.#files.set(file.path, next);
    try {
      const text = readWhole(name, file.signature);
      if (text === undefined) {
        this.#wake();
        return;
      }
      next.signature = file.signature;
      if (text.trim() === '' && next.objects.length > 0) {
        // What truncates a file before writing it anew leaves it like this for a moment, or for long if it dies.
        next.problems = [{ file: name, message: 'is empty; what it held stays until the file is removed or written' }];
        return;
      }
      const parsed = parseManifest(text);
      if (parsed.ok) {
        next.objects = this.#same(next.objects, parsed.objects);
        next.problems = [];
        for (const { object, line } of next.objects) this.#places.set(object, `${name}:${line}`);
      } else next.problems = parsed.problems.map((problem) => ({ file: name, ...problem }));
    } catch (error) {
      // Gone in the meantime, or not readable: the signature stays old, so it is tried again with each look.
      next.problems = [{ file: name, message: (error as Error).message }];
    }
  }

  #miss(path: string, known: KnownFile): void {
    const now = performance.now();
    known.missingSince ??= now;
    if (now - known.missingSince >= MISSING_MS) this.#files.delete(path);
    else this.#wake();
  }

  /** Objects that did not change stay the same JavaScript objects. */
  #same(before: readonly ManifestObject[], after: readonly ManifestObject[]): ManifestObject[] {
    const old = new Map(before.map((entry) => [entry.key, entry.object]));
    return after.map((entry) => {
      const object = old.get(entry.key);
      const unchanged = object !== undefined && JSON.stringify(object) === JSON.stringify(entry.object);
      return unchanged ? { ...entry, object } : entry;
    });
  }

  #merge(problems: ManifestProblem[], first: boolean): void {
    const lists: Record<keyof ObjectSet, object[]> = {
      namespaces: [],
      nodes: [],
      pods: [],
      services: [],
      endpointSlices: [],
      authorizationPolicies: [],
      peerAuthentications: [],
    };
    const owners = new Map<string, { readonly path: string; readonly missing: boolean }>();
    // A file that is missing comes last: it may have been renamed to one that is there.
    const files = [...this.#files].sort(
      ([left, a], [right, b]) =>
        Number(a.missingSince !== undefined) - Number(b.missingSince !== undefined) || (left < right ? -1 : 1),
    );
    for (const [path, file] of files) {
      problems.push(...file.problems);
      for (const { key, kind, line, object } of file.objects) {
        const owner = owners.get(key);
        if (owner === undefined) {
          owners.set(key, { path, missing: file.missingSince !== undefined });
          lists[FIELDS[kind as keyof typeof FIELDS]].push(object);
        } else if (file.missingSince === undefined) {
          const winner = join(this.#directory, owner.path);
          problems.push({
            file: join(this.#directory, path),
            line,
            message: `${key} is in ${winner} already, which wins; remove one of the two`,
          });
        }
      }
    }
    this.#report(problems);
    const order = Object.values(lists).flat();
    const same = order.length === this.#order.length && order.every((object, index) => object === this.#order[index]);
    if (same && !first) return;
    this.#order = order;
    // The checks of each kind have seen every field that the types name.
    this.#listener.onChange(lists as unknown as ObjectSet);
  }

  #report(problems: readonly ManifestProblem[]): void {
    const before = this.#problems;
    this.#problems = new Map(problems.map((problem) => [JSON.stringify(problem), problem]));
    for (const [key, problem] of this.#problems) {
      if (before.has(key)) continue;
      this.#log.warn({ event: 'manifest_problem', ...problem }, 'a manifest is not used; its last good state stays');
      this.#listener.onProblem?.(problem);
    }
    for (const [key, problem] of before) {
      if (!this.#problems.has(key))
        this.#log.info({ event: 'manifest_problem_gone', ...problem }, 'a manifest is mended');
    }
    if (before.size > 0 && this.#problems.size === 0) this.#listener.onMended?.();
  }

  #watch(listing: Listing): void {
    for (const [path, { inode, watcher }] of this.#watchers) {
      if (listing.directories.get(path) === inode) continue;
      watcher.close();
      this.#watchers.delete(path);
    }
    for (const [path, inode] of listing.directories) {
      if (this.#watchers.has(path)) continue;
      try {
        const watcher = watch(join(this.#directory, path), () => this.#wake());
        const forget = (): void => {
          watcher.close();
          if (this.#watchers.get(path)?.watcher === watcher) this.#watchers.delete(path);
        };
        watcher.on('error', forget);
        this.#watchers.set(path, { inode, watcher });
      } catch (error) {
        if (!this.#watchFailed) {
          this.#watchFailed = true;
          this.#log.warn(
            { event: 'manifest_watch_failed', file: join(this.#directory, path), err: error, rescanMs: RESCAN_MS },
            'cannot watch the folder, so changes are seen later; more inotify watches (fs.inotify.*) may help',
          );
        }
      }
    }
  }

  #closeWatchers(): void {
    for (const { watcher } of this.#watchers.values()) watcher.close();
    this.#watchers.clear();
  }
}

function isWithin(path: string, directories: ReadonlyMap<string, string>): boolean {
  for (const directory of directories.keys()) {
    if (path === directory || path.startsWith(`${directory}/`)) return true;
  }
  return false;
}

/** Reads a file; undefined when it changed since it was listed or while it was read. */
function readWhole(path: string, signature: string): string | undefined {
  const descriptor = openSync(path, 'r');
  try {
    const before = fstatSync(descriptor, { bigint: true });
    if (signatureOf(before) !== signature) return undefined;
    if (before.size > MAX_FILE_BYTES) throw new Error(`is larger than ${MAX_FILE_BYTES} bytes; split it`);
    const text = readFileSync(descriptor, 'utf8');
    return signatureOf(fstatSync(descriptor, { bigint: true })) === signature ? text : undefined;
  } finally {
    closeSync(descriptor);
  }
}
