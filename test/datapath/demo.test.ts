/** The demo as a newcomer runs it, kept up and left by ^C, and stopped at bad moments: nothing is ever left. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { killGroup } from '../../src/lab/exec.ts';
import { type Inventory, leftSince, run, takeInventory, waitFor } from '../../src/lab/index.ts';

const REPOSITORY = fileURLToPath(new URL('../..', import.meta.url));
const TERMINAL = fileURLToPath(new URL('../lib/programs/terminal.py', import.meta.url));
const UP_MS = 240_000;
/** Stopping takes the drain of two proxies and the removal of what was made. */
const DOWN_MS = 60_000;

/** A demo that runs beside the test; its output is gathered. */
class Demo {
  readonly child: ChildProcess;
  output = '';
  readonly ended: Promise<number>;

  constructor(argv: readonly string[]) {
    const [program = '', ...args] = argv;
    this.child = spawn(program, args, { cwd: REPOSITORY, detached: true, stdio: ['pipe', 'pipe', 'pipe'] });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      stream?.on('data', (bytes: Buffer) => {
        this.output += bytes.toString();
      });
    }
    this.ended = new Promise((resolve) => {
      this.child.once('close', (code, signal) => resolve(code ?? (signal === 'SIGINT' ? 130 : -1)));
    });
  }

  get running(): boolean {
    return this.child.exitCode === null && this.child.signalCode === null;
  }

  async says(text: string): Promise<void> {
    await waitFor(
      `the demo to say "${text}"`,
      () => {
        if (!this.output.includes(text) && !this.running) throw new Error('it has ended');
        return this.output.includes(text);
      },
      { timeoutMs: UP_MS, hint: () => this.output },
    );
  }

  async end(): Promise<number> {
    const late = new Promise<never>((_, reject) => {
      setTimeout(() => reject(new Error(`it does not end:\n${this.output}`)), DOWN_MS).unref();
    });
    return Promise.race([this.ended, late]);
  }
}

describe('the demo', () => {
  let before: Inventory;
  let demo: Demo | undefined;
  beforeEach(async () => {
    before = await takeInventory();
  });
  afterEach(async () => {
    if (demo?.running && demo.child.pid !== undefined) {
      killGroup(demo.child.pid, 'SIGTERM');
      await demo.end().catch(() => killGroup(demo?.child.pid ?? 0, 'SIGKILL'));
    }
    demo = undefined;
  });

  /** What is there that was not before, and who runs of ours. */
  const left = async (): Promise<string[]> => [
    ...(await leftSince(before, () => true)),
    ...processesOf('/run/ebbtide-lab/').map((command) => `process ${command}`),
    ...processesOf('main.js\0demo').map((command) => `process ${command}`),
  ];

  it(
    'kept up in a terminal it says how to look around, what it says works, and ^C takes everything away',
    async () => {
      demo = new Demo(['python3', TERMINAL, 'npm', 'run', 'demo', '--', '--keep']);
      await demo.says('It stays up until ^C');
      await demo.says('the wire between the nodes:');
      const shown = demo.output.replaceAll('\r', '');
      expect(shown).not.toContain('\u2717');
      const commands = shown.split('\n').filter((line) => /^ {2}(sh -c|nsenter) /.test(line));
      expect(commands.length).toBe(4);
      const [curl = '', redis = '', metrics = ''] = commands;
      expect((await run(['bash', '-c', curl])).stdout).toMatch(/^payload-[0-9a-f]{16}\n$/);
      expect((await run(['bash', '-c', redis])).stdout).toBe('PONG\n');
      expect((await run(['bash', '-c', metrics])).stdout).toContain('istio_tcp_connections_opened_total{');
      const manifests = /manifests, read again when you change one: (\S+)/.exec(shown)?.[1] ?? '';
      expect(readdirSync(manifests).length).toBeGreaterThan(5);
      expect((await leftSince(before, (_, name) => name.includes('ebbtide-'))).length).toBeGreaterThan(5);

      demo.child.stdin?.write('^C\n');
      expect(await demo.end(), demo.output).toBe(0);
      expect(demo.output).toMatch(/all \d+ steps succeeded/);
      expect(await left()).toEqual([]);
    },
    UP_MS + DOWN_MS,
  );

  for (const [what, argv, when] of [
    ['npm, while pods are made', ['npm', 'run', 'demo', '--', '--keep'], 'Ebbtide demo: two nodes'],
    ['npx, while the mesh starts', ['npx', 'ebbtide', 'demo', '--keep'], 'without a mesh'],
    ['npm, while policy is shown', ['npm', 'run', 'demo'], "the server sees the client pod's own address"],
  ] as const) {
    it(
      `SIGINT to ${what}, reaches the demo, which takes everything away`,
      async () => {
        demo = new Demo(argv);
        await demo.says(when);
        demo.child.kill('SIGINT');
        const code = await demo.end();
        expect(demo.output).toContain('interrupted; everything is removed');
        expect(code, demo.output).toBe(130);
        expect(await left()).toEqual([]);
      },
      UP_MS + DOWN_MS,
    );
  }

  it(
    'npm killed with -9 in the middle of it: the demo ends by itself and takes everything away',
    async () => {
      demo = new Demo(['npm', 'run', 'demo', '--', '--keep']);
      await demo.says('without a mesh');
      demo.child.kill('SIGKILL');
      await waitFor('the demo to end', () => processesOf('main.js\0demo').length === 0, { timeoutMs: DOWN_MS });
      expect(await left()).toEqual([]);
    },
    UP_MS + DOWN_MS,
  );
});

/** Command lines of running processes that contain this text. */
function processesOf(text: string): string[] {
  const found: string[] = [];
  for (const pid of readdirSync('/proc')) {
    if (!/^\d+$/.test(pid) || Number(pid) === process.pid) continue;
    try {
      const command = readFileSync(`/proc/${pid}/cmdline`, 'utf8');
      if (command.includes(text)) found.push(command.replaceAll('\0', ' '));
    } catch {
      // It has ended.
    }
  }
  return found;
}
