/**
 * Two clocks: the wall clock, by which certificates are judged and which may be wrong and may jump, and one that only goes
 * on, also while the machine is suspended.
 */
import { uptime } from 'node:os';

export interface Clock {
  /** Milliseconds since the epoch, as this machine believes. */
  wallMs(): number;
  /** Milliseconds of CLOCK_BOOTTIME, with hundredths of a second. Differences count, not values. */
  elapsedMs(): number;
  /** Milliseconds of CLOCK_MONOTONIC, by which timers go: it stands still while the machine sleeps. */
  timerMs(): number;
}

export const SYSTEM_CLOCK: Clock = {
  wallMs: () => Date.now(),
  elapsedMs: () => uptime() * 1000,
  timerMs: () => performance.now(),
};

/** What timers that were set before do not know of. */
export interface ClockJump {
  /** By how much the wall clock was set, forward or (negative) back; 0 where it was not. Milliseconds. */
  readonly setByMs: number;
  /** How long the machine slept, so that timers are late; 0 where it did not. */
  readonly sleptMs: number;
}

/** A clock that is disciplined as usual is slewed by half a millisecond a second. */
const JUMP_MS = 1000;
const LOOK_MS = 2000;

/**
 * Calls back when the wall clock was set or the machine has slept, within some seconds.
 * @returns ends it
 */
export function watchClock(onJump: (jump: ClockJump) => void, clock: Clock = SYSTEM_CLOCK): { close(): void } {
  const look = () => {
    const elapsedMs = clock.elapsedMs();
    return { wall: clock.wallMs() - elapsedMs, slept: elapsedMs - clock.timerMs() };
  };
  // From one look to the next: what is slewed does not add up to a jump.
  let before = look();
  const timer = setInterval(() => {
    const after = look();
    const jumped = (ms: number): number => (Math.abs(ms) >= JUMP_MS ? ms : 0);
    const jump = { setByMs: jumped(after.wall - before.wall), sleptMs: jumped(after.slept - before.slept) };
    before = after;
    if (jump.setByMs !== 0 || jump.sleptMs !== 0) onJump(jump);
  }, LOOK_MS);
  timer.unref();
  return { close: () => clearInterval(timer) };
}

/** How far another clock is ahead of the wall clock here. */
export interface ClockOffset {
  /** Negative: it is behind, so the clock here is ahead. */
  readonly offsetMs: number;
  /** The true offset differs by no more than this. */
  readonly uncertaintyMs: number;
}

/** When a request left and its answer began to come. */
export interface AskedAt {
  readonly wallMs: number;
  readonly elapsedMs: number;
}

export const now = (clock: Clock = SYSTEM_CLOCK): AskedAt => ({ wallMs: clock.wallMs(), elapsedMs: clock.elapsedMs() });

/**
 * Offset by a Date of an HTTP answer (RFC 9110, 6.6.1), which has whole seconds: the server's clock was between that and a
 * second later at some moment between request and answer.
 * @returns undefined where there is no date, or the wall clock was set meanwhile
 */
export function offsetByDate(date: unknown, sent: AskedAt, received: AskedAt): ClockOffset | undefined {
  const told = typeof date === 'string' ? Date.parse(date) : Number.NaN;
  const wall = received.wallMs - sent.wallMs;
  if (Number.isNaN(told) || Math.abs(wall - (received.elapsedMs - sent.elapsedMs)) >= JUMP_MS) return undefined;
  const [lowest, highest] = [told - received.wallMs, told + 1000 - sent.wallMs];
  return { offsetMs: (lowest + highest) / 2, uncertaintyMs: (highest - lowest) / 2 };
}

/** Seconds, minutes, hours or days, whichever is readable: `130 s`, `25 h`. */
export function roughly(ms: number): string {
  const seconds = Math.abs(ms) / 1000;
  if (seconds < 300) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}
