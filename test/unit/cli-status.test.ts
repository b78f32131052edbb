/** What `ebbtide status` makes of an agent's answer: exit code, table and JSON, asked over a real socket. */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import type { Server } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, it } from 'vitest';
import type { CaptureStatus } from '../../src/agent/capture.ts';
import type { PodReport } from '../../src/agent/pods.ts';
import { serveStatus } from '../../src/agent/status.ts';

const EBBTIDE = fileURLToPath(new URL('../../dist/main.js', import.meta.url));
const capture: CaptureStatus = {
  uid: 'u1',
  cookie: 7n,
  outbound: true,
  inbound: true,
  guard: 'attached',
  listeners: { outbound: 2, hbone: 2, plaintext: 2 },
  capturedConnections: 3n,
  steeredConnections: 4n,
  refusedConnections: 0n,
  flows: 1,
  guardDrops: 0n,
  probeConnections: 0n,
  inheritedConnections: 0,
  lastCaptureNs: 1n,
};
const captured: PodReport = {
  uid: 'u1',
  namespace: 'n',
  name: 'a',
  wanted: true,
  state: 'captured',
  reason: '',
  capture,
};
const plain: PodReport = {
  uid: 'u2',
  namespace: 'p',
  name: 'b',
  wanted: false,
  state: 'not enrolled',
  reason: 'namespace is not labelled' as PodReport['reason'],
  capture: undefined,
};

let directory: string;
let server: Server | undefined;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'cli-status-'));
});
afterEach(() => {
  server?.close();
  server = undefined;
  rmSync(directory, { recursive: true, force: true });
});

async function status(pods: readonly PodReport[], ...argv: string[]) {
  const socket = join(directory, 'zds.sock');
  server = await serveStatus(`${socket}.status`, {
    status: () => ({ node: 'node1', proxies: [42], pods, problems: [] }),
  });
  return ask(socket, ...argv);
}

function ask(socket: string, ...argv: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    const env = { ...process.env, INPOD_UDS: socket };
    const child = execFile(process.execPath, [EBBTIDE, 'status', ...argv], { env }, (_, stdout, stderr) => {
      resolve({ code: child.exitCode ?? -1, stdout, stderr });
    });
  });
}

it('all that is wanted is captured: 0, a line for each pod', async () => {
  const { code, stdout } = await status([captured, plain]);
  expect(code).toBe(0);
  const lines = stdout.trim().split('\n');
  expect(lines[0]).toBe('node node1, proxy 42');
  expect(lines[2]).toMatch(
    /^n\/a +in the mesh +captured +outbound, inbound, guard +outbound 2, hbone 2, plaintext 2 +\d+ s ago$/,
  );
  expect(lines[3]).toMatch(/^p\/b +not +not enrolled +- +- +- +namespace is not labelled$/);
});

it.each([
  ['the kernel does not know it', { capture: undefined, state: 'waiting', reason: 'no such file' }],
  ['connects are not rewritten', { capture: { ...capture, outbound: false } }],
  ['nothing is steered', { capture: { ...capture, inbound: false } }],
  ['the veth is not guarded', { capture: { ...capture, guard: 'no veth' } }],
  ['there is no listener', { capture: { ...capture, listeners: { outbound: 2, hbone: 0, plaintext: 2 } } }],
] satisfies [string, Partial<PodReport>][])('a wanted pod is not captured: 1, as %s', async (_, change) => {
  const { code, stdout } = await status([plain, { ...captured, ...change }]);
  expect(code).toBe(1);
  expect(stdout).toMatch(/^n\/a /m);
});

it('one pod by name, as JSON', async () => {
  const broken: PodReport = { ...captured, uid: 'u3', name: 'c', capture: undefined };
  const { code, stdout } = await status([captured, broken], 'n/a', '--output', 'json');
  expect(code).toBe(0);
  expect(JSON.parse(stdout)).toMatchObject({ node: 'node1', pods: [{ uid: 'u1', capture: { cookie: '7' } }] });
  expect(JSON.parse(stdout).pods).toHaveLength(1);
});

it('no such pod: 2, and which there are', async () => {
  const { code, stdout, stderr } = await status([captured], 'nobody');
  expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
  expect(stderr).toContain('n/a');
});

it('no agent: 2, and where it was looked for', async () => {
  const { code, stderr } = await ask(join(directory, 'none.sock'));
  expect(code).toBe(2);
  expect(stderr).toContain(join(directory, 'none.sock.status'));
});
