/** The tables at the end of a run. */
import type { Kernel } from './kernels.ts';
import { kernelsFor, type Outcome } from './runner.ts';

/** Lines of a table whose columns are as wide as their longest cell; the first column is to the left. */
function table(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  const line = (row: readonly string[]): string =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join('  ');
  return rows.map((row) => `${line(row).trimEnd()}\n`).join('');
}

/** Prints what failed, the tables, and as the last line "N passed, N failed". @returns number of failures */
export function printReport(
  kernels: readonly Kernel[],
  groups: readonly string[],
  outcomes: readonly Outcome[],
  seconds: number,
): number {
  const write = (text: string): void => void process.stdout.write(text);
  for (const { kernel, group, failures } of outcomes)
    for (const failure of failures) write(`\nFAILED on ${kernel}, ${group}: ${failure.slice(0, 8000)}\n`);

  const cell = (kernel: Kernel, group: string): string => {
    const found = outcomes.find((each) => each.kernel === kernel.name && each.group === group);
    if (found === undefined) return kernelsFor(group, kernels).includes(kernel) ? 'not run' : '-';
    const count = found.failed > 0 ? `${found.failed} FAILED` : `${found.passed} passed`;
    return `${count} ${Math.round(found.seconds)}s`;
  };
  write('\n');
  write(
    table([
      ['kernel', ...groups],
      ...kernels.map((kernel) => [kernel.release, ...groups.map((group) => cell(kernel, group))]),
    ]),
  );

  const verified = kernels.map((kernel) => ({
    kernel,
    by: Object.assign(
      {},
      ...outcomes.filter((each) => each.kernel === kernel.name).map((each) => each.verified),
    ) as Record<string, number>,
  }));
  const programs = [...new Set(verified.flatMap(({ by }) => Object.keys(by)))].sort();
  if (programs.length > 0) {
    write('\nInstructions processed by the verifier (half of its limit, 500000, fails)\n');
    write(
      table([
        ['program', ...kernels.map((each) => each.release)],
        ...programs.map((program) => [program, ...verified.map(({ by }) => `${by[program] ?? '-'}`)]),
      ]),
    );
  }
  for (const kernel of kernels) {
    const lacks = outcomes.filter((each) => each.kernel === kernel.name).flatMap((each) => each.lacks);
    for (const each of new Set(lacks)) write(`${kernel.release} lacks ${each}\n`);
  }
  const sum = (of: 'passed' | 'failed'): number => outcomes.reduce((total, each) => total + each[of], 0);
  write(`\n${Math.round(seconds)} s\n${sum('passed')} passed, ${sum('failed')} failed\n`);
  return sum('failed');
}
