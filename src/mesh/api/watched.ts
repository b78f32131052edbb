/** A list of Kubernetes objects that is kept up to date, whatever the API server and the network in between do. */
import type { IncomingMessage } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { Backoff } from '../backoff.js';
import type { Logger } from '../log.js';
import { type Api, ApiError } from './api.js';
import { LineSplitter } from './lines.js';

/** An object as the API sends it. */
export interface ApiObject {
  readonly metadata: { readonly name: string; readonly namespace?: string; readonly resourceVersion?: string };
}

export interface WatchedOptions<T> {
  readonly api: Api;
  /** Of the list, such as `/api/v1/pods`. */
  readonly path: string;
  readonly fieldSelector?: string | undefined;
  readonly labelSelector?: string | undefined;
  readonly log: Logger;
  /** Reduces an object to what is of use, so that the rest takes no memory; objects that reduce to the same stay the same. */
  pick?(object: ApiObject): T;
  /**
   * Called after every change of the list, with the keys of what was added, replaced or removed; not for the first list.
   * What it throws is logged.
   */
  changed(keys: readonly string[]): void;
  /** The resource may not exist (yet): a custom resource whose definition is not installed. Its list is empty then. */
  readonly optional?: boolean | undefined;
  /** Times in milliseconds; the defaults fit clusters. */
  readonly times?: Partial<WatchedTimes> | undefined;
}

export interface WatchedTimes {
  /** A watch from which no byte came for so long is taken for dead. Servers send a bookmark each minute. */
  readonly silence: number;
  /** Time for one page of a list. */
  readonly page: number;
  /** Longest delay between two tries. */
  readonly maxBackoff: number;
  /** How often it is looked for a resource that does not exist, with jitter. */
  readonly absent: number;
}

const DEFAULT_TIMES: WatchedTimes = { silence: 75_000, page: 60_000, maxBackoff: 10_000, absent: 30_000 };

/** What happened so far; for metrics and tests. */
export interface WatchedCounters {
  /** Whole lists read. */
  lists: number;
  pages: number;
  /** Watches begun. */
  watches: number;
  /** ADDED, MODIFIED, DELETED. */
  events: number;
  bookmarks: number;
  /** Times that the server no longer knew our version (410). */
  expired: number;
  /** Times that credentials were refused (401). */
  unauthorized: number;
  /** Watches given up because nothing came from them. */
  silences: number;
  /** Watches that ended in the middle of a line or with one that is no JSON. */
  broken: number;
  /** Tries that failed, all reasons together. */
  failures: number;
}

/** Small enough that what a page leaves behind does not grow the heap: 100 pods are some 400 KB. */
const PAGE_OBJECTS = 100;
const INITIAL_BACKOFF_MS = 200;
/** The server ends a watch after so many seconds, which spreads watches over its replicas: drawn from this to twice this. */
const WATCH_SECONDS = 300;
/** etcd refuses objects above 1.5 MiB; as JSON with its managed fields one may be larger. */
const MAX_LINE_BYTES = 16 << 20;
/** A resource has to be missing so often in a row before what is known of it is dropped: a starting server may not know it yet. */
const MISSING_LIMIT = 3;
/** Watches that may fail in a row before the list is read again. */
const WATCH_FAILURES = 5;
/** A watch that lasted so long was a good one, also where nothing happened. */
const STEADY_MS = 10_000;

interface WatchEvent {
  readonly type: string;
  readonly object: ApiObject & { readonly code?: number; readonly reason?: string; readonly message?: string };
}

/** Why a watch ended without a failure of its own. */
type Ended = 'by the server' | 'silent';

export class Watched<T = ApiObject> {
  readonly #options: WatchedOptions<T>;
  readonly #times: WatchedTimes;
  readonly #log: Logger;
  readonly #stop = new AbortController();
  readonly #backoff: Backoff;
  readonly #items = new Map<string, T>();
  readonly #versions = new Map<string, string>();
  readonly #counters: WatchedCounters = {
    lists: 0,
    pages: 0,
    watches: 0,
    events: 0,
    bookmarks: 0,
    expired: 0,
    unauthorized: 0,
    silences: 0,
    broken: 0,
    failures: 0,
  };
  /** Version to watch from; undefined while the list has to be read. */
  #version: string | undefined;
  #running: Promise<void> | undefined;
  #missing = 0;
  #failed = 0;
  #told: string | undefined;
  #heard = 0;
  #watching = false;

  constructor(options: WatchedOptions<T>) {
    this.#options = options;
    this.#times = { ...DEFAULT_TIMES, ...options.times };
    this.#log = options.log.child({ resource: options.path });
    this.#backoff = new Backoff({ initialMs: INITIAL_BACKOFF_MS, maxMs: this.#times.maxBackoff });
  }

  get counters(): Readonly<WatchedCounters> {
    return this.#counters;
  }

  /** Whether a watch is open now; else the items are those of when it last was. */
  get watching(): boolean {
    return this.#watching;
  }

  /** When the server was last heard of this resource, by `performance.now()`; 0 before the first time. */
  get heard(): number {
    return this.#heard;
  }

  /** Objects by `namespace/name` (`name` where cluster-wide). The very same object as long as it did not change. */
  items(): ReadonlyMap<string, T> {
    return this.#items;
  }

  /** Resolves with the first whole list, however long that takes; rejects only when closed before. */
  start(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#running = this.#run(resolve).catch((error: unknown) => {
        if (this.#stop.signal.aborted) reject(new ApiError(0, 'Aborted', `${this.#options.path}: closed`));
        else this.#log.fatal({ event: 'watch_bug', err: error }, 'the watch of a list ended by a mistake in it');
      });
    });
  }

  /** Ends the watch and waits for that. */
  async close(): Promise<void> {
    this.#stop.abort();
    await this.#running;
  }

  /** Returns only by being closed. */
  async #run(first: () => void): Promise<void> {
    for (;;) {
      this.#stop.signal.throwIfAborted();
      try {
        if (this.#version === undefined) {
          const changed = await this.#list();
          if (this.#counters.lists === 1) first();
          else this.#tell(changed);
        }
        if (this.#version !== undefined) await this.#watchOnce(this.#version);
        else {
          this.#recovered();
          await this.#pause(this.#times.absent * (0.5 + Math.random()));
        }
      } catch (error) {
        this.#stop.signal.throwIfAborted();
        await this.#pause(this.#failure(error));
      } finally {
        this.#watching = false;
      }
    }
  }

  /** Reads the whole list, page by page, and only then takes it. @returns keys that differ */
  async #list(): Promise<string[]> {
    const { api, path, fieldSelector, labelSelector, optional } = this.#options;
    const next = new Map<string, string | undefined>();
    const fresh = new Map<string, T>();
    let token: string | undefined;
    let version: string | undefined;
    do {
      const query = { limit: PAGE_OBJECTS, fieldSelector, labelSelector, continue: token };
      const page = await api
        .request<{ metadata?: { resourceVersion?: string; continue?: string }; items?: ApiObject[] }>('GET', path, {
          query,
          timeoutMs: this.#times.page,
          signal: this.#stop.signal,
        })
        .catch((error: unknown) => {
          if (optional && error instanceof ApiError && error.status === 404) return undefined;
          throw error;
        });
      if (page === undefined) return this.#absent();
      this.#heard = performance.now();
      this.#counters.pages++;
      if (!Array.isArray(page.items) || typeof page.metadata?.resourceVersion !== 'string') {
        throw new ApiError(0, 'BadAnswer', `GET ${path}: the answer is no list`);
      }
      for (const object of page.items) {
        const key = keyOf(object);
        const own = object.metadata.resourceVersion;
        next.set(key, own);
        if (own !== undefined && this.#versions.get(key) === own) continue;
        // Reduced at once, so that the pages need not be held together.
        const item = this.#pick(object, key);
        if (item !== undefined) fresh.set(key, item);
      }
      version = page.metadata.resourceVersion;
      token = page.metadata.continue || undefined;
    } while (token !== undefined);
    const changed: string[] = [];
    for (const key of [...this.#items.keys()]) {
      if (!next.has(key)) {
        this.#remove(key);
        changed.push(key);
      }
    }
    for (const [key, item] of fresh) if (this.#put(key, next.get(key), item)) changed.push(key);
    this.#counters.lists++;
    this.#missing = 0;
    this.#version = version;
    return changed;
  }

  /** The resource does not exist. */
  #absent(): string[] {
    this.#heard = performance.now();
    this.#missing++;
    // A server that starts may not know the resource yet; what was known stays for a while.
    if (this.#items.size > 0 && this.#missing < MISSING_LIMIT) {
      throw new ApiError(404, 'NotFound', `GET ${this.#options.path}: the server does not know this resource any more`);
    }
    const changed = [...this.#items.keys()];
    for (const key of changed) this.#remove(key);
    this.#counters.lists++;
    this.#version = undefined;
    return changed;
  }

  /** One watch, from its request to its end. Throws what failed. */
  async #watchOnce(from: string): Promise<void> {
    const { api, path, fieldSelector, labelSelector } = this.#options;
    const stream = await api.stream(path, {
      query: {
        watch: true,
        allowWatchBookmarks: true,
        resourceVersion: from,
        timeoutSeconds: Math.round(WATCH_SECONDS * (1 + Math.random())),
        fieldSelector,
        labelSelector,
      },
      timeoutMs: Math.min(this.#times.silence, this.#times.page),
      signal: this.#stop.signal,
    });
    this.#counters.watches++;
    this.#watching = true;
    this.#heard = performance.now();
    this.#recovered();
    const begun = performance.now();
    const ended = await this.#read(stream);
    const lasted = performance.now() - begun;
    if (ended === 'silent') this.#counters.silences++;
    this.#log.debug({ event: 'watch_ended', reason: ended, lastedMs: Math.round(lasted) }, 'a watch ended');
    // Never at once: a server that ends watches as soon as they begin would be asked in a circle.
    if (lasted >= STEADY_MS) this.#backoff.reset();
    await this.#pause(this.#backoff.next());
  }

  /** Takes a watch's events until it ends. */
  #read(stream: IncomingMessage): Promise<Ended> {
    return new Promise((resolve, reject) => {
      const lines = new LineSplitter(MAX_LINE_BYTES);
      let done = false;
      const settle = (settle: () => void): void => {
        if (done) return;
        done = true;
        clearTimeout(timer);
        stream.destroy();
        settle();
      };
      const timer = setTimeout(() => settle(() => resolve('silent')), this.#times.silence);
      stream.on('data', (chunk: Buffer) => {
        if (done) return;
        timer.refresh();
        this.#heard = performance.now();
        try {
          const changed: string[] = [];
          try {
            for (const line of lines.push(chunk)) if (line !== '') this.#take(line, changed);
          } finally {
            this.#tell(changed);
          }
        } catch (error) {
          settle(() => reject(error instanceof ApiError ? error : this.#broken((error as Error).message)));
        }
      });
      // An end within a line is a server or proxy that was cut off; the line comes again, from the version we have.
      stream.on('end', () =>
        settle(() => (lines.pending > 0 ? reject(this.#broken('it ended within a line')) : resolve('by the server'))),
      );
      stream.on('error', (error) =>
        settle(() => reject(new ApiError(0, 'Unreachable', `watch of ${this.#options.path}: ${error.message}`))),
      );
      stream.on('close', () => settle(() => reject(this.#broken('the connection was cut'))));
    });
  }

  #broken(what: string): ApiError {
    this.#counters.broken++;
    return new ApiError(0, 'BadAnswer', `watch of ${this.#options.path}: ${what}`);
  }

  /** Takes one line of a watch. */
  #take(line: string, changed: string[]): void {
    const { type, object } = JSON.parse(line) as WatchEvent;
    if (type === 'ERROR') {
      throw new ApiError(
        object.code ?? 0,
        object.reason ?? 'Unknown',
        `watch of ${this.#options.path}: ${object.code} ${object.message}`,
      );
    }
    const version = object?.metadata?.resourceVersion;
    if (version === undefined) throw new SyntaxError('an event without a version');
    if (type === 'BOOKMARK') this.#counters.bookmarks++;
    else {
      this.#counters.events++;
      const key = keyOf(object);
      if (type === 'DELETED') {
        if (this.#remove(key)) changed.push(key);
      } else if (type === 'ADDED' || type === 'MODIFIED') {
        const item = this.#pick(object, key);
        if (item !== undefined && this.#put(key, version, item)) changed.push(key);
      } else throw new SyntaxError(`an event of unknown type ${JSON.stringify(type)}`);
    }
    this.#version = version;
    this.#backoff.reset();
    this.#failed = 0;
  }

  /** The reduced object; undefined where that fails: one bad object must not stop the others. */
  #pick(object: ApiObject, key: string): T | undefined {
    if (this.#options.pick === undefined) return object as T;
    try {
      return this.#options.pick(object);
    } catch (error) {
      this.#log.error(
        { event: 'object_unreadable', object: key, err: error },
        'an object cannot be read; it stays as it was',
      );
      return undefined;
    }
  }

  /** @returns whether the item differs from the one that was there */
  #put(key: string, version: string | undefined, item: T): boolean {
    const before = this.#items.get(key);
    if (version !== undefined) this.#versions.set(key, version);
    if (before !== undefined && this.#options.pick !== undefined && JSON.stringify(before) === JSON.stringify(item)) {
      return false;
    }
    this.#items.set(key, item);
    return true;
  }

  #remove(key: string): boolean {
    this.#versions.delete(key);
    return this.#items.delete(key);
  }

  #tell(changed: readonly string[]): void {
    if (changed.length === 0) return;
    try {
      this.#options.changed(changed);
    } catch (error) {
      this.#log.error({ event: 'watch_listener_failed', err: error }, 'what a change should have led to failed');
    }
  }

  #recovered(): void {
    if (this.#told === undefined) return;
    this.#told = undefined;
    this.#log.info({ event: 'watch_recovered', counters: this.#counters }, 'the Kubernetes API answers again');
  }

  /** Notes a failure. @returns how long to wait, in milliseconds */
  #failure(error: unknown): number {
    this.#counters.failures++;
    const failed = error instanceof ApiError ? error : new ApiError(0, 'Unknown', (error as Error).message);
    if (failed.status === 410) {
      // Our version, or that of a list that was read for long, is forgotten by the server: nothing to wait for.
      this.#counters.expired++;
      this.#version = undefined;
      this.#log.info({ event: 'watch_expired' }, 'the server forgot our version; reading the list again');
      return this.#backoff.next();
    }
    if (failed.status === 401) this.#counters.unauthorized++;
    // What does not get better by watching again may by listing: a resource that is gone, a version from another etcd.
    if (++this.#failed >= WATCH_FAILURES || (failed.status >= 400 && failed.status < 500 && failed.status !== 401)) {
      this.#version = undefined;
    }
    if (this.#told !== failed.message) {
      this.#told = failed.message;
      this.#log.warn(
        { event: 'watch_failed', status: failed.status, reason: failed.reason, objects: this.#items.size },
        `${failed.message}; what is known stays in use, trying again without end`,
      );
    }
    return Math.max(this.#backoff.next(), failed.retryAfterMs ?? 0);
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#stop.signal });
  }
}

function keyOf({ metadata }: ApiObject): string {
  return metadata.namespace === undefined ? metadata.name : `${metadata.namespace}/${metadata.name}`;
}
