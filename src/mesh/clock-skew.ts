/** Says it when this machine's clock is not that of those it deals with, once for each change and now and then while it lasts. */
import { type Clock, type ClockJump, type ClockOffset, roughly, SYSTEM_CLOCK } from './clock.js';
import type { Logger } from './log.js';

/** What is beyond this is told; less does no harm to certificates that are backdated by two minutes. */
export const SKEW_MS = 5000;
/** From here on fresh certificates are soon refused. */
export const HARMFUL_SKEW_MS = 60_000;
const REPEAT_MS = 600_000;

const HINT =
  'set the clock of the machine that is wrong (NTP, such as chrony); certificates and tokens are judged by it. Nothing needs to ' +
  'be restarted then';

/** Whether an offset is a skew, whatever its uncertainty. */
export const isSkewed = ({ offsetMs, uncertaintyMs }: ClockOffset): boolean =>
  Math.abs(offsetMs) - uncertaintyMs > SKEW_MS;

/** "130 s behind", "24 h ahead": this machine, by the offset of another. */
export const skewText = (offsetMs: number): string => `${roughly(offsetMs)} ${offsetMs > 0 ? 'behind' : 'ahead'}`;

export class ClockSkew {
  readonly #log: Logger;
  readonly #clock: Clock;
  readonly #known = new Map<string, { readonly offsetMs: number; readonly saidAtMs: number }>();

  constructor(log: Logger, clock: Clock = SYSTEM_CLOCK) {
    this.#log = log;
    this.#clock = clock;
  }

  /** Offset of the clock that is off most, 0 where none is. */
  get worstMs(): number {
    const all = [...this.#known.values()].map(({ offsetMs }) => offsetMs);
    return all.reduce((worst, each) => (Math.abs(each) > Math.abs(worst) ? each : worst), 0);
  }

  /** @param against whose clock it is, such as `controller`; @param offset undefined where it could not be told */
  told(against: string, offset: ClockOffset | undefined): void {
    if (offset === undefined) return;
    const before = this.#known.get(against);
    if (!isSkewed(offset)) {
      // Within the uncertainty nothing is known for sure: what was said stays.
      if (before === undefined || Math.abs(offset.offsetMs) + offset.uncertaintyMs > SKEW_MS * 2) return;
      this.#known.delete(against);
      this.#log.info(
        { event: 'clock_skew_gone', against },
        `no clock skew any more: this machine and the ${against} agree`,
      );
      return;
    }
    const { offsetMs, uncertaintyMs } = offset;
    const atMs = this.#clock.elapsedMs();
    const changed = before === undefined || Math.abs(offsetMs - before.offsetMs) > SKEW_MS;
    if (!changed && atMs - before.saidAtMs < REPEAT_MS) {
      this.#known.set(against, { offsetMs, saidAtMs: before.saidAtMs });
      return;
    }
    this.#known.set(against, { offsetMs, saidAtMs: atMs });
    const fields = {
      event: 'clock_skew',
      against,
      offsetMs: Math.round(offsetMs),
      uncertaintyMs: Math.round(uncertaintyMs),
      hint: HINT,
    };
    const text = `clock skew: this machine is ${skewText(offsetMs)}, by the clock of the ${against}`;
    if (Math.abs(offsetMs) >= HARMFUL_SKEW_MS) this.#log.error(fields, text);
    else this.#log.warn(fields, text);
  }

  /** How far the clock is from others now they tell with their next answers. */
  jumped({ setByMs, sleptMs }: ClockJump): void {
    const set = `was set ${setByMs > 0 ? 'forward' : 'back'} by ${roughly(setByMs)}`;
    this.#log.warn(
      { event: 'clock_jumped', setByMs: Math.round(setByMs), sleptMs: Math.round(sleptMs) },
      setByMs === 0 ? `this machine slept for ${roughly(sleptMs)}` : `this machine's clock ${set}`,
    );
  }
}

/** Whether an error's text, OpenSSL's, says that a certificate is refused for the time. */
export const isRefusedForTime = (text: string): boolean =>
  /certificate (is not yet valid|has expired)|CERT_(NOT_YET_VALID|HAS_EXPIRED)/i.test(text);
