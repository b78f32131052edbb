/** What a long run tells meanwhile: progress with the time since its start, and figures that were measured. */
const started = performance.now();

/** A step of progress. */
export function say(what: string): void {
  process.stdout.write(`${((performance.now() - started) / 1000).toFixed(1).padStart(7)} s  ${what}\n`);
}

/** A measured figure, on a line of its own. */
export function figure(name: string, value: string): void {
  process.stdout.write(`figure: ${name}: ${value}\n`);
}
