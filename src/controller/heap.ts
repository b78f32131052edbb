/** When the controller has V8 collect its garbage. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

/** Quiet time before a collection, and time between two: each stops the program for some tenths of a second. */
const QUIET_MS = 1000;
const PAUSE_MS = 60_000;

/**
 * Collects some time after large things were let go. By itself V8 does so when as much again was allocated, which in a
 * quiet cluster is never: some 70 MB would stay that are of no use.
 */
export class Collector {
  readonly #collect: () => void;
  readonly #quietMs: number;
  readonly #pauseMs: number;
  #last = Number.NEGATIVE_INFINITY;
  #timer: NodeJS.Timeout | undefined;

  constructor(collect: () => void = collectAll, quietMs = QUIET_MS, pauseMs = PAUSE_MS) {
    this.#collect = collect;
    this.#quietMs = quietMs;
    this.#pauseMs = pauseMs;
  }

  /** Something large was let go. */
  later(): void {
    clearTimeout(this.#timer);
    const due = Math.max(this.#quietMs, this.#last + this.#pauseMs - performance.now());
    this.#timer = setTimeout(() => {
      this.#last = performance.now();
      this.#collect();
    }, due);
    this.#timer.unref();
  }
}

/** The only kind of collection that also gives V8's own empty pages back. */
function collectAll(): void {
  setFlagsFromString('--expose-gc');
  const gc = runInNewContext('gc') as (options: object) => void;
  gc({ type: 'major', execution: 'sync', flavor: 'last-resort' });
}
