/** Signals to `npx ebbtide ...` reach the command, whichever they are: nothing stays behind. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

const REPOSITORY = fileURLToPath(new URL('../..', import.meta.url));

describe('npx', () => {
  let directory: string;
  let npx: ChildProcess;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'npx-'));
    mkdirSync(join(directory, 'manifests'));
  });
  afterEach(() => {
    for (const pid of running()) process.kill(pid, 'SIGKILL');
    rmSync(directory, { recursive: true });
  });

  /** Processes that have this test's directory among their arguments. */
  const running = (): number[] =>
    readdirSync('/proc')
      .map(Number)
      .filter((pid) => {
        try {
          return pid > 0 && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(`${directory}/`);
        } catch {
          return false;
        }
      });

  for (const signal of ['SIGINT', 'SIGTERM', 'SIGKILL'] as const) {
    it(`${signal} to npx alone ends the controller that it runs`, async () => {
      const argv = ['ebbtide', 'controller', '--manifests', join(directory, 'manifests')];
      npx = spawn('npx', [...argv, '--data', join(directory, 'data'), '--listen', '127.0.0.1:0'], {
        cwd: REPOSITORY,
        stdio: ['ignore', 'pipe', 'inherit'],
        detached: true,
      });
      let said = '';
      npx.stdout?.on('data', (bytes: Buffer) => {
        said += bytes.toString();
      });
      const ended = new Promise((resolve) => npx.once('exit', (code) => resolve(code)));
      await until(() => said.includes('"listening"'));
      expect(running().length).toBeGreaterThan(1);
      npx.kill(signal);
      const code = await ended;
      await until(() => running().length === 0);
      if (signal !== 'SIGKILL') {
        expect(code).toBe(0);
        expect(said).toContain('"stopped"');
      }
    });
  }
});

async function until(condition: () => boolean): Promise<void> {
  const deadline = performance.now() + 15_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`not within 15 s: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
