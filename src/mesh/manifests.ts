/** A folder of Kubernetes manifests as the source of objects: read, watched, and never half believed. */
import { closeSync, type FSWatcher, fstatSync, openSync, readFileSync, watch } from 'node:fs';
import { join } from 'node:path';
import type { ObjectSet } from './kubernetes.js';
import type { Logger } from './log.js';
import { mayHoldPolicy } from './manifest-checks.js';
import { type ManifestObject, type ParsedFile, parseManifest } from './manifest-file.js';
import { type ListedFile, type Listing, listFolder, signatureOf } from './manifest-folder.js';

/** Something wrong with the folder or a file of it. */
export interface ManifestProblem {
  /**
   * `unread`: the file cannot be read, what was read of it before stays in force. `duplicate`: an object is in two files and
   * differs, the first file's is in force. `warning`: the file is in force, taken as it was meant.
   */
  readonly severity: 'unread' | 'duplicate' | 'warning';
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
  /** Called when the last file that could not be read is mended or gone. */
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
  /** The text that `objects` are of; undefined where no text of the file was ever good. */
  text: string | undefined;
  /** It never was good, and may hold what protects something. */
  holdsPolicy: boolean;
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
 * hold the same object the first by name wins, and nothing is said where they agree.
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
  #unreadableFolders: readonly string[] = [];
  readonly #remembered: ReadonlyMap<string, string>;
  #rootInode = '';
  #timer: NodeJS.Timeout | undefined;
  #rescan: NodeJS.Timeout | undefined;
  #gatheringSince: number | undefined;
  #watchFailed = false;
  #stopped = false;

  /** @param remembered texts that were good in an earlier run, by path: in force for files that cannot be read at the start */
  constructor(
    directory: string,
    log: Logger,
    listener: ManifestListener,
    remembered: ReadonlyMap<string, string> = new Map(),
  ) {
    this.#remembered = remembered;
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

  /** What is wrong now. */
  problems(): ManifestProblem[] {
    return [...this.#problems.values()];
  }

  /** False while something cannot be read: an object that is not there may be in it. */
  get complete(): boolean {
    return !this.problems().some(({ severity }) => severity === 'unread');
  }

  /** The texts in force, by path, to be remembered for the next run. */
  texts(): Map<string, string> {
    return new Map([...this.#files].flatMap(([path, { text }]) => (text === undefined ? [] : [[path, text]])));
  }

  /** Files and folders of which no good state is known, and which may hold what protects something. */
  unknownPolicies(): string[] {
    const files = [...this.#files].filter(([, { holdsPolicy }]) => holdsPolicy).map(([path]) => path);
    return [...files, ...this.#unreadableFolders].map((path) => join(this.#directory, path));
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
    return { severity: 'unread', file: this.#directory, message };
  }

  #take(listing: Listing, first: boolean): void {
    this.#rootInode = listing.directories.get('') ?? '';
    this.#watch(listing);
    for (const file of listing.files.values()) this.#look(file, first);
    for (const [path, known] of this.#files) {
      if (listing.files.has(path) || isWithin(path, listing.unreadable)) known.missingSince = undefined;
      else this.#miss(path, known);
    }
    this.#unreadableFolders = [...listing.unreadable.keys()].filter(
      (path) => ![...this.#files.keys()].some((file) => file === path || file.startsWith(`${path}/`)),
    );
    const problems: ManifestProblem[] = [...listing.unreadable].map(([path, message]) => ({
      severity: 'unread',
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
    const next = known ?? {
      signature: '',
      objects: [],
      problems: [],
      text: undefined,
      holdsPolicy: false,
      missingSince: undefined,
    };
    this.#files.set(file.path, next);
    try {
      const text = readWhole(name, file.signature);
      if (text === undefined) {
        this.#wake();
        return;
      }
      next.signature = file.signature;
      if (text.trim() === '') this.#recall(next, file.path, name);
      if (text.trim() === '' && next.objects.length > 0) {
        // What truncates a file before writing it anew leaves it like this for a moment, or for long if it dies.
        next.problems = [
          {
            severity: 'unread',
            file: name,
            message: 'is empty; what it held stays until the file is removed or written',
          },
        ];
        return;
      }
      const parsed = parseManifest(text);
      if (parsed.ok) this.#believe(next, name, text, parsed);
      else {
        this.#recall(next, file.path, name);
        next.problems = parsed.problems.map((problem) => ({ severity: 'unread', file: name, ...problem }));
        next.holdsPolicy = next.text === undefined && mayHoldPolicy(text);
      }
    } catch (error) {
      // Gone in the meantime, or not readable: the signature stays old, so it is tried again with each look.
      this.#recall(next, file.path, name);
      next.problems = [{ severity: 'unread', file: name, message: (error as Error).message }];
      next.holdsPolicy = next.text === undefined && (error as NodeJS.ErrnoException).code !== 'ENOENT';
    }
  }

  /** Takes what an earlier run knew of a file of which nothing good is known in this one. */
  #recall(file: KnownFile, path: string, name: string): void {
    const text = file.text === undefined ? this.#remembered.get(path) : undefined;
    const parsed = text === undefined ? undefined : parseManifest(text);
    if (text !== undefined && parsed?.ok) this.#believe(file, name, text, parsed);
  }

  #believe(file: KnownFile, name: string, text: string, parsed: ParsedFile & { readonly ok: true }): void {
    file.text = text;
    file.holdsPolicy = false;
    file.objects = this.#same(file.objects, parsed.objects);
    file.problems = parsed.warnings.map((warning) => ({ severity: 'warning', file: name, ...warning }));
    for (const { object, line } of file.objects) this.#places.set(object, `${name}:${line}`);
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
    const lists: Record<(typeof FIELDS)[keyof typeof FIELDS], object[]> = {
      namespaces: [],
      nodes: [],
      pods: [],
      services: [],
      endpointSlices: [],
      authorizationPolicies: [],
      peerAuthentications: [],
    };
    const owners = new Map<string, { readonly path: string; readonly object: object }>();
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
          owners.set(key, { path, object });
          lists[FIELDS[kind as keyof typeof FIELDS]].push(object);
        } else if (file.missingSince === undefined && JSON.stringify(object) !== JSON.stringify(owner.object)) {
          const winner = join(this.#directory, owner.path);
          problems.push({
            severity: 'duplicate',
            file: join(this.#directory, path),
            line,
            message: `${key} is in ${winner} already and is not the same there; that one is in force, remove one of the two`,
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
    const wasComplete = this.complete;
    this.#problems = new Map(problems.map((problem) => [JSON.stringify(problem), problem]));
    for (const [key, problem] of this.#problems) {
      if (before.has(key)) continue;
      const fields = { event: 'manifest_problem', ...problem };
      const told = `${placeOf(problem)}: ${problem.message}`;
      if (problem.severity === 'unread') this.#log.error(fields, `${told}; what was read of it before stays in force`);
      else this.#log.warn(fields, told);
      this.#listener.onProblem?.(problem);
    }
    for (const [key, problem] of before) {
      if (!this.#problems.has(key))
        this.#log.info({ event: 'manifest_problem_gone', ...problem }, 'a manifest is mended');
    }
    if (!wasComplete && this.complete) this.#listener.onMended?.();
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

/** `FILE:LINE:COLUMN`, as compilers say it and editors read it. */
function placeOf({ file, line, column }: ManifestProblem): string {
  return [file, line, column].filter((part) => part !== undefined).join(':');
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
