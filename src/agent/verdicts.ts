/** Decides about each pod of the node before it exists, so that the kernel knows whom to hold until they are captured. */
import type { Logger } from '../mesh/log.js';
import type { Capture, PodVerdict } from './capture.js';

/** A pod of the node, as far as it is decided about. */
export interface JudgedPod {
  /** UID in the name of its cgroup. */
  readonly cgroupUid: string;
  /** undefined: not known yet, so that it is held as one of which nothing is known. */
  readonly verdict: PodVerdict | undefined;
}

export class Verdicts {
  readonly #capture: Pick<Capture, 'decide' | 'forget' | 'decided' | 'held'>;
  readonly #log: Logger;
  readonly #known = new Map<string, PodVerdict>();
  #tidied = false;

  constructor(capture: Pick<Capture, 'decide' | 'forget' | 'decided' | 'held'>, log: Logger) {
    this.#capture = capture;
    this.#log = log;
  }

  /** @param complete whether a pod that is not among them is gone */
  apply(pods: readonly JudgedPod[], complete: boolean): void {
    const there = new Set(pods.map(({ cgroupUid }) => cgroupUid));
    // First who goes: there is room for so many only.
    if (complete) this.#forget(there);
    for (const { cgroupUid, verdict } of pods) {
      if (verdict === undefined || this.#known.get(cgroupUid) === verdict) continue;
      if (this.#try('decide', cgroupUid, () => this.#capture.decide(cgroupUid, verdict))) {
        this.#known.set(cgroupUid, verdict);
      }
    }
  }

  #forget(there: ReadonlySet<string>): void {
    const gone = [...this.#known.keys()].filter((uid) => !there.has(uid));
    if (!this.#tidied) {
      this.#tidied = true;
      // What an agent before this one decided, and what appeared while none was there.
      const before = [...this.#capture.decided(), ...this.#capture.held().map(({ uid }) => uid)];
      gone.push(...before.filter((uid) => !there.has(uid)));
    }
    for (const uid of new Set(gone)) {
      if (this.#try('forget', uid, () => this.#capture.forget(uid))) this.#known.delete(uid);
    }
  }

  #try(what: string, uid: string, call: () => void): boolean {
    try {
      call();
      return true;
    } catch (error) {
      this.#log.error({ event: 'verdict_failed', what, uid, err: error }, 'a pod could not be decided about');
      return false;
    }
  }
}
