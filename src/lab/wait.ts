/** Waiting that ends: a condition, a deadline, and words for what did not happen. */
import { setTimeout as sleep } from 'node:timers/promises';

export { sleep };

/**
 * How much longer than on an idle machine everything may take, by EBBTIDE_LAB_PATIENCE (default 1): in a virtual machine
 * without hardware support a program runs twenty times slower.
 */
const PATIENCE = Math.max(1, Number(process.env.EBBTIDE_LAB_PATIENCE) || 1);

/** An upper limit in milliseconds, by the machine that this runs on. */
export function patient(ms: number): number {
  return ms * PATIENCE;
}

/** Thrown by a condition that can never become true any more: ends the waiting at once. */
export class Hopeless extends Error {}

export interface WaitOptions {
  /** Default 20 s; {@link patient} is applied to it. */
  readonly timeoutMs?: number;
  /** Pause between two looks, default 50 ms; at least as long as it took to look, which is time that the others do not have. */
  readonly intervalMs?: number;
  /** Added to the error: where to look next. */
  readonly hint?: () => string;
}

/**
 * Asks until the answer is neither false nor undefined.
 * @param what words for the condition: "the proxy of node1 to be ready"
 * @throws Error naming what was waited for, how long, and the last error of the condition
 */
export async function waitFor<T>(
  what: string,
  condition: () => Promise<T | undefined | false> | T | undefined | false,
  options: WaitOptions = {},
): Promise<T> {
  const timeoutMs = patient(options.timeoutMs ?? 20_000);
  const deadline = performance.now() + timeoutMs;
  let lastError = '';
  for (;;) {
    const looked = performance.now();
    try {
      const answer = await condition();
      if (answer !== undefined && answer !== false) return answer;
    } catch (error) {
      if (error instanceof Hopeless)
        throw new Error(`gave up waiting for ${what}: ${error.message}\n${options.hint?.() ?? ''}`);
      lastError = error instanceof Error ? error.message : String(error);
    }
    if (performance.now() >= deadline) {
      const because = lastError === '' ? '' : `; last error: ${lastError}`;
      const hint = options.hint?.() ?? '';
      throw new Error(`waited ${timeoutMs} ms for ${what}${because}${hint === '' ? '' : `\n${hint}`}`);
    }
    await sleep(Math.max(options.intervalMs ?? 50, performance.now() - looked));
  }
}
