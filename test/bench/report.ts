/** The benchmark's figures: medians of rounds, the table, and how they stand to the floors. */

export interface Summary {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** figure -> path -> summary */
export type Report = Record<string, Record<string, Summary>>;

/** Collects samples of figures. */
export class Samples {
  readonly #samples = new Map<string, Map<string, number[]>>();

  add(path: string, figures: Readonly<Record<string, number>>): void {
    for (const [figure, value] of Object.entries(figures)) {
      const paths = this.#samples.get(figure) ?? new Map<string, number[]>();
      this.#samples.set(figure, paths);
      paths.set(path, [...(paths.get(path) ?? []), value]);
    }
  }

  report(): Report {
    const report: Report = {};
    for (const [figure, paths] of this.#samples) {
      report[figure] = {};
      for (const [path, values] of paths) report[figure][path] = summarise(values);
    }
    return report;
  }
}

function summarise(values: readonly number[]): Summary {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (index: number) => round(sorted[index] ?? Number.NaN);
  const middle = (sorted.length - 1) / 2;
  const median = round(((sorted[Math.floor(middle)] ?? Number.NaN) + (sorted[Math.ceil(middle)] ?? Number.NaN)) / 2);
  return { median, min: at(0), max: at(sorted.length - 1) };
}

function round(value: number): number {
  return Number(value.toPrecision(4));
}

/** A promise of the project on its figures: what is measured against what, in the same run. */
interface Floor {
  readonly what: string;
  readonly met: (value: (figure: string, path: string) => number) => { readonly ratio: number; readonly met: boolean };
}

const atLeast = (ratio: number, floor: number) => ({ ratio, met: ratio >= floor });
const atMost = (ratio: number, ceiling: number) => ({ ratio, met: ratio <= ceiling });

const FLOORS: readonly Floor[] = [
  { what: '1 stream: at least 1.2x HAProxy', met: (v) => atLeast(v('gbps_1', 'mesh') / v('gbps_1', 'haproxy'), 1.2) },
  { what: '4 streams: at least 1.0x HAProxy', met: (v) => atLeast(v('gbps_4', 'mesh') / v('gbps_4', 'haproxy'), 1) },
  { what: '16 streams: at least 1.0x HAProxy', met: (v) => atLeast(v('gbps_16', 'mesh') / v('gbps_16', 'haproxy'), 1) },
  {
    what: 'round trip p50: adds at most what HAProxy adds',
    met: (v) => {
      const direct = v('rtt_p50_us', 'direct');
      return atMost((v('rtt_p50_us', 'mesh') - direct) / (v('rtt_p50_us', 'haproxy') - direct), 1);
    },
  },
  {
    what: 'new connections: at least 4x HAProxy',
    met: (v) => atLeast(v('connections_per_s', 'mesh') / v('connections_per_s', 'haproxy'), 4),
  },
  { what: 'memory idle: at most 90 MB', met: (v) => atMost(v('rss_idle_mb', 'mesh') / 90, 1) },
  {
    what: 'memory with 10,000 connections: at most 40 MB more',
    met: (v) => atMost((v('rss_10k_mb', 'mesh') - v('rss_idle_mb', 'mesh')) / 40, 1),
  },
  {
    what: 'memory a minute after: at most 1.25x idle',
    met: (v) => atMost(v('rss_after_mb', 'mesh') / v('rss_idle_mb', 'mesh'), 1.25),
  },
];

/** The report as text: a table of medians with ranges, then the floors whose figures were measured. */
export function render(report: Report, paths: readonly string[]): string {
  const lines = [['figure', ...paths].map((text, i) => (i === 0 ? text.padEnd(24) : text.padStart(24))).join('')];
  for (const [figure, byPath] of Object.entries(report)) {
    const cells = paths.map((path) => {
      const summary = byPath[path];
      return (summary === undefined ? '-' : `${summary.median} (${summary.min}-${summary.max})`).padStart(24);
    });
    lines.push(figure.padEnd(24) + cells.join(''));
  }
  lines.push('');
  for (const { what, met } of FLOORS) {
    const result = met((figure, path) => report[figure]?.[path]?.median ?? Number.NaN);
    if (Number.isNaN(result.ratio)) continue;
    lines.push(`${result.met ? 'met    ' : 'NOT MET'}  ${what}  (${result.ratio.toFixed(2)})`);
  }
  return lines.join('\n');
}
