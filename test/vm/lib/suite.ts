/** Files of the datapath tests, run by vitest in a guest: one test here for each file there. */
import { writeSync } from 'node:fs';
import { afterAll, beforeAll, describe, it, type TestContext } from 'vitest';
import { chosenKernel } from './chosen.ts';
import { type Guest, startGuest } from './guest.ts';
import { PEER } from './images.ts';

/** How much longer than on an idle machine a guest may take, where it runs in software. */
const PATIENCE = { tcg: 8, kvm: 1 } as const;
const RUN_TIMEOUT_MS = 1_500_000;

/** What vitest's JSON reporter writes, as far as it is read here. */
interface Report {
  readonly testResults: readonly {
    readonly name: string;
    readonly status: string;
    readonly message: string;
    readonly startTime: number;
    readonly endTime: number;
    readonly assertionResults: readonly {
      readonly fullName: string;
      readonly status: string;
      readonly failureMessages?: readonly string[];
    }[];
  }[];
}

/** How many tests there were in a file; kept as `meta.inner` of the test that stands for it. */
export interface InnerCounts {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
  /** How long the file took in the guest. */
  readonly seconds: number;
}

declare module 'vitest' {
  interface TaskMeta {
    inner?: InnerCounts;
  }
}

/** Environment for tests in this guest. */
export function guestEnvironment(guest: Guest): Record<string, string> {
  return {
    EBBTIDE_LAB_PATIENCE: `${PATIENCE[guest.accelerator]}`,
    EBBTIDE_TEST_PEER: `/ebbtide/${PEER}`,
    NO_COLOR: '1',
  };
}

export interface InGuestOptions {
  /** Pattern of names: of the files' tests those alone. */
  readonly only?: string;
  /** Processors; default 2. In software a second one makes all work a third slower: to be had where races are looked for. */
  readonly cpus?: number;
}

/** Declares a test for each file of test/datapath, all run in one guest, by one vitest. */
export function runInGuest(title: string, files: readonly string[], { only, cpus = 2 }: InGuestOptions = {}): void {
  describe(title, { timeout: RUN_TIMEOUT_MS }, () => {
    let guest: Guest | undefined;
    let report: Report | undefined;
    let said = '';

    beforeAll(async () => {
      guest = await startGuest({ kernel: chosenKernel(), memoryMb: 3072, cpus });
      const paths = files.map((each) => `test/datapath/${each}.test.ts`);
      const reporters = ['--reporter=default', '--reporter=json', '--outputFile.json=/run/report.json'];
      // One process for all files: to start another takes ten seconds of software.
      const argv = [
        'vitest',
        'run',
        '--project',
        'datapath',
        '--no-isolate',
        ...reporters,
        ...paths,
        ...(only === undefined ? [] : ['-t', only]),
      ];
      const result = await guest.run(argv, {
        timeoutMs: RUN_TIMEOUT_MS,
        env: guestEnvironment(guest),
        // Tests in software take minutes: whoever waits wants to see them.
        onOutput: (text) => void (process.env.EBBTIDE_VM_VERBOSE && writeSync(2, text)),
      });
      said = `${result.stdout.slice(-20_000)}\n${result.stderr.slice(-5000)}\n${guest.console.slice(-2000)}`;
      const written = await guest.run(['cat', '/run/report.json']);
      if (written.code === 0) report = JSON.parse(written.stdout) as Report;
    }, RUN_TIMEOUT_MS);
    afterAll(async () => await guest?.dispose());

    for (const file of files) {
      it(file, (context: TestContext) => {
        const found = report?.testResults.find((each) => each.name.endsWith(`/${file}.test.ts`));
        if (found === undefined) throw new Error(`${file} was not run to its end in the guest: ${said}`);
        const count = (status: string) => found.assertionResults.filter((each) => each.status === status).length;
        const inner = { passed: count('passed'), failed: count('failed'), skipped: found.assertionResults.length };
        const seconds = Math.round((found.endTime - found.startTime) / 1000);
        context.task.meta.inner = { ...inner, skipped: inner.skipped - inner.passed - inner.failed, seconds };
        const failures = found.assertionResults.filter((each) => each.status === 'failed');
        const texts = failures.map((each) => `${each.fullName}\n${each.failureMessages?.join('\n') ?? ''}`);
        if (found.status !== 'passed')
          throw new Error([found.message, ...texts].filter((each) => each).join('\n\n') || `${file}: ${said}`);
        if (inner.passed === 0) throw new Error(`${file} has no test that passed`);
      });
    }
  });
}
