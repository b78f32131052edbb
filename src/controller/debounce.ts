/** Gathers bursts of calls: the work is done once things are quiet, or once the first call has waited long enough. */
export class Debounce {
  readonly #work: () => void;
  readonly #quietMs: number;
  readonly #maxMs: number;
  #timer: NodeJS.Timeout | undefined;
  #first = 0;

  /** @param maxMs longest that a call waits while others keep coming */
  constructor(work: () => void, quietMs: number, maxMs: number) {
    this.#work = work;
    this.#quietMs = quietMs;
    this.#maxMs = maxMs;
  }

  call(): void {
    const now = performance.now();
    if (this.#timer === undefined) this.#first = now;
    clearTimeout(this.#timer);
    const delay = Math.max(0, Math.min(this.#quietMs, this.#first + this.#maxMs - now));
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#work();
    }, delay);
  }

  /** Forgets what was called for. */
  close(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }
}
