/** Durations as people write them, the same wherever one can be given. */

const UNITS: ReadonlyMap<string, number> = new Map([
  ['ms', 1],
  ['s', 1000],
  ['m', 60_000],
  ['h', 3_600_000],
  ['d', 86_400_000],
]);
const LONGEST_MS = 10 * 365 * 86_400_000;

/**
 * Parses `24h`, `1h30m`, `250ms`; a bare number is seconds, as ztunnel's SECRET_TTL has it. More than nothing, at most ten years.
 * @returns milliseconds
 * @throws Error saying what is expected
 */
export function parseDuration(text: string): number {
  let sum = 0;
  if (/^\d{1,12}$/.test(text)) sum = Number(text) * 1000;
  else if (/^(\d{1,12}(ms|s|m|h|d))+$/.test(text)) {
    for (const [, digits = '', unit = ''] of text.matchAll(/(\d+)(ms|s|m|h|d)/g)) {
      sum += Number(digits) * (UNITS.get(unit) ?? Number.NaN);
    }
  }
  if (!(sum > 0 && sum <= LONGEST_MS)) throw new Error('expected a duration such as 24h, 1h30m, 30s or 250ms');
  return sum;
}
