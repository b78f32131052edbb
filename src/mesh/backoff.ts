/** What a {@link Backoff} is made of. */
export interface BackoffOptions {
  readonly initialMs: number;
  readonly maxMs: number;
  /** Uniform in [0, 1); a test gives its own. */
  readonly random?: () => number;
}

/**
 * Exponential backoff with jitter and without an end: a delay is drawn from [base/2, base], base doubles up to a cap.
 * Delays are in milliseconds.
 */
export class Backoff {
  readonly #options: BackoffOptions;
  #base: number;

  constructor(options: BackoffOptions) {
    this.#options = options;
    this.#base = options.initialMs;
  }

  /** The next delay, in milliseconds. */
  next(): number {
    const base = this.#base;
    this.#base = Math.min(base * 2, this.#options.maxMs);
    return base / 2 + ((this.#options.random ?? Math.random)() * base) / 2;
  }

  /** Called after a success: the next delay starts small again. */
  reset(): void {
    this.#base = this.#options.initialMs;
  }
}
