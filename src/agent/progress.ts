/** How long each pod of the node has been on its way into the mesh: for readiness, metrics, events and annotations. */
import type { PodOutlook } from './pods.js';

export interface PodProgress extends PodOutlook {
  /** Captured, and served by the newest proxy. */
  readonly good: boolean;
  /** How long it has been wanted and not good, in milliseconds; 0 where it is good or not wanted. */
  readonly badForMs: number;
}

interface Known {
  badSinceMs: number | undefined;
  /** It was good once, or not new when it was first seen. */
  counted: boolean;
}

export class Progress {
  readonly #now: () => number;
  readonly #enrolled: (milliseconds: number) => void;
  #known = new Map<string, Known>();
  #latest: readonly PodProgress[] = [];

  /**
   * @param enrolled told how long a pod took from when it was first seen wanted, once, the first time that it is good
   * @param now milliseconds of a monotonic clock
   */
  constructor(enrolled: (milliseconds: number) => void, now: () => number = () => performance.now()) {
    this.#enrolled = enrolled;
    this.#now = now;
  }

  /** Every pod of the node, as of the last update. */
  get latest(): readonly PodProgress[] {
    return this.#latest;
  }

  update(outlooks: readonly PodOutlook[]): readonly PodProgress[] {
    const now = this.#now();
    const known = new Map<string, Known>();
    this.#latest = outlooks.map((outlook) => {
      const { uid, wanted, state, served } = outlook;
      const good = wanted && state === 'captured' && served;
      // One that was captured by an agent before this one says nothing about how long enrolment takes.
      const entry = this.#known.get(uid) ?? { badSinceMs: undefined, counted: state === 'captured' || !wanted };
      known.set(uid, entry);
      if (!wanted || good) {
        if (good && !entry.counted) this.#enrolled(now - (entry.badSinceMs ?? now));
        entry.counted = good;
        entry.badSinceMs = undefined;
      } else entry.badSinceMs ??= now;
      return { ...outlook, good, badForMs: entry.badSinceMs === undefined ? 0 : now - entry.badSinceMs };
    });
    this.#known = known;
    return this.#latest;
  }
}
