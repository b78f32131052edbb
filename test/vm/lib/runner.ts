/** Runs groups of tests, each a vitest of its own with one kernel, and reads what became of them. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { killGroup } from '../../../src/lab/exec.ts';
import type { KernelName } from './kernels.ts';
import { CHECKOUT } from './place.ts';
import type { InnerCounts } from './suite.ts';

/** What one group did on one kernel. */
export interface Outcome {
  readonly kernel: KernelName;
  readonly group: string;
  readonly passed: number;
  readonly failed: number;
  readonly seconds: number;
  /** Texts of what failed. */
  readonly failures: readonly string[];
  /** Instructions that the verifier processed, by program. */
  readonly verified: Readonly<Record<string, number>>;
  /** What the kernel lacks, and what serves instead. */
  readonly lacks: readonly string[];
}

/** What vitest's JSON reporter writes, as far as it is read here. */
interface Report {
  readonly testResults: readonly {
    readonly status: string;
    readonly message: string;
    readonly assertionResults: readonly {
      readonly fullName: string;
      readonly status: string;
      readonly failureMessages?: readonly string[];
      readonly meta?: {
        readonly inner?: InnerCounts;
        readonly verified?: Readonly<Record<string, number>>;
        readonly lacks?: readonly string[];
      };
    }[];
  }[];
}

/** Begun first: they take longest. */
const LONG = ['pair-reboot', 'capture', 'pods', 'crashes', 'pair-links', 'systemd', 'pair-clock', 'load'];

/** Take minutes and hardly depend on the kernel: run on the first that is asked for. */
const ON_ONE_KERNEL = [
  'apparmor',
  'crashes',
  'guests',
  'load',
  'pair-clock',
  'pair-ip6',
  'pair-links',
  'pair-reboot',
  'systemd',
];

/** Those of the kernels on which a group is run. */
export function kernelsFor<K>(group: string, kernels: readonly K[]): readonly K[] {
  return ON_ONE_KERNEL.includes(group) ? kernels.slice(0, 1) : kernels;
}

/** Groups by their files in the harness's folder. */
export function findGroups(directory: string): string[] {
  const names = readdirSync(directory).flatMap((each) => /^(.*)\.test\.ts$/.exec(each)?.[1] ?? []);
  const rank = (name: string): number => (LONG.includes(name) ? LONG.indexOf(name) : LONG.length);
  return names.sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
}

export interface RunnerOptions {
  /** Directory for the reports. */
  readonly results: string;
  readonly keep: boolean;
  readonly verbose: boolean;
  readonly say: (text: string) => void;
}

export class Runner {
  readonly #options: RunnerOptions;
  readonly #running = new Set<ChildProcess>();
  #stopped = false;

  constructor(options: RunnerOptions) {
    this.#options = options;
  }

  async run(kernel: KernelName, group: string): Promise<Outcome> {
    const { results, keep, verbose, say } = this.#options;
    const file = join(results, `${kernel}-${group}.json`);
    const argv = ['run', '--project', 'vm', `test/vm/${group}.test.ts`];
    // The other one says why a hook failed.
    const reporters = ['--reporter=json', `--outputFile.json=${file}`, '--reporter=default'];
    const started = performance.now();
    const vitest = ['--pdeathsig', 'KILL', join(CHECKOUT, 'node_modules/.bin/vitest'), ...argv, ...reporters];
    const child = spawn('setpriv', vitest, {
      cwd: CHECKOUT,
      // A process group of its own: ^C of the terminal is ours, to end guests in order.
      detached: true,
      stdio: ['ignore', verbose ? 'inherit' : 'pipe', verbose ? 'inherit' : 'pipe'],
      env: {
        ...process.env,
        EBBTIDE_VM_KERNEL: kernel,
        EBBTIDE_VM_KEEP: keep ? '1' : '',
        EBBTIDE_VM_VERBOSE: verbose ? '1' : '',
      },
    });
    this.#running.add(child);
    let said = '';
    for (const stream of [child.stdout, child.stderr])
      stream?.setEncoding('utf8').on('data', (text: string) => {
        said = (said + text).slice(-20_000);
        if (keep) process.stderr.write(text.match(/^kept: .*\n/m)?.[0] ?? '');
      });
    await new Promise<void>((resolve) => child.once('close', () => resolve()));
    this.#running.delete(child);
    const seconds = (performance.now() - started) / 1000;
    const report = existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Report) : undefined;
    const outcome = { kernel, group, seconds, ...this.#count(report, said) };
    say(`${kernel} ${group}: ${outcome.passed} passed, ${outcome.failed} failed, ${Math.round(seconds)} s`);
    return outcome;
  }

  /** Ends everything that runs, at once; guests end with their processes. */
  stop(): void {
    this.#stopped = true;
    for (const child of this.#running) if (child.pid !== undefined) killGroup(child.pid, 'SIGKILL');
  }

  #count(report: Report | undefined, said: string): Omit<Outcome, 'kernel' | 'group' | 'seconds'> {
    if (report === undefined) {
      const why = this.#stopped ? 'interrupted' : `there is no report: ${said}`;
      return { passed: 0, failed: 1, failures: [why], verified: {}, lacks: [] };
    }
    let passed = 0;
    let failed = 0;
    const failures: string[] = [];
    const tests = report.testResults.flatMap((each) => each.assertionResults);
    for (const test of tests) {
      const inner = test.meta?.inner;
      passed += inner?.passed ?? (test.status === 'passed' ? 1 : 0);
      failed += test.status === 'failed' ? Math.max(1, inner?.failed ?? 1) : 0;
      if (inner)
        this.#options.say(`  ${test.fullName}: ${inner.passed} passed, ${inner.failed} failed, ${inner.seconds} s`);
      if (test.status === 'failed') failures.push(`${test.fullName}\n${test.failureMessages?.join('\n') ?? ''}`);
    }
    for (const file of report.testResults) {
      if (file.status === 'passed' || file.assertionResults.some((each) => each.status === 'failed')) continue;
      failed++;
      failures.push(file.message || said);
    }
    return {
      passed,
      failed,
      failures,
      verified: Object.assign({}, ...tests.map((each) => each.meta?.verified ?? {})) as Record<string, number>,
      lacks: tests.flatMap((each) => each.meta?.lacks ?? []),
    };
  }
}
