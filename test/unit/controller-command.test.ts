/** `ebbtide controller` as a process: files in, pushes out, and its end. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Client } from '@grpc/grpc-js';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { ADDRESS, AUTHORIZATION, bearer, connect, summary, TestStream } from '../lib/xds-client.ts';

const MAIN = join(import.meta.dirname, '../../dist/main.js');
const NODES =
  'apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: n2}\n';
const POD = `apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {ebbtide.dev/netns: /run/netns/db}}
spec: {nodeName: n1, serviceAccountName: db}
status: {podIP: 10.0.0.1}
`;
const DENY = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [evil]}}]}]}
`;

let directory: string;
let child: ChildProcess;
let lines: Record<string, unknown>[];
let client: Client | undefined;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebE-cmd-'));
  mkdirSync(join(directory, 'manifests'));
  lines = [];
});
afterEach(async () => {
  client?.close();
  client = undefined;
  if (child?.exitCode === null && child.signalCode === null) {
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  rmSync(directory, { recursive: true, force: true });
});

const write = (name: string, text: string): void => {
  writeFileSync(join(directory, 'tmp'), text);
  renameSync(join(directory, 'tmp'), join(directory, 'manifests', name));
};

function run(...extra: string[]): void {
  const args = [
    '--manifests',
    join(directory, 'manifests'),
    '--data',
    join(directory, 'data'),
    '--listen',
    '127.0.0.1:0',
  ];
  child = spawn(process.execPath, [MAIN, 'controller', ...args, ...extra], { stdio: ['ignore', 'pipe', 'pipe'] });
  if (child.stdout) createInterface(child.stdout).on('line', (line) => lines.push(JSON.parse(line)));
}

const events = (event: string) => lines.filter((line) => line.event === event);
async function event(name: string): Promise<Record<string, unknown>> {
  await expect.poll(() => events(name).length, { timeout: 10_000, message: `event ${name}` }).toBeGreaterThan(0);
  return events(name)[0] ?? {};
}

async function open(): Promise<TestStream> {
  const { port } = await event('listening');
  client = connect(join(directory, 'data'), port as number);
  return new TestStream(client, bearer(join(directory, 'data'), 'n1'));
}

test('a policy reaches a proxy within a second of its file being written', async () => {
  write('nodes.yaml', NODES);
  write('pod.yaml', POD);
  run();
  const stream = await open();
  expect(statSync(join(directory, 'data/tokens/n2')).mode & 0o777).toBe(0o600);
  stream.subscribe(ADDRESS);
  stream.subscribe(AUTHORIZATION);
  await stream.nextAcked();
  await stream.nextAcked();
  const latencies: number[] = [];
  for (let round = 0; round < 10; round++) {
    const started = performance.now();
    write('policy.yaml', round % 2 === 0 ? DENY : DENY.replace('evil', `evil${round}`));
    expect(summary(await stream.nextAcked())).toEqual(['+shop/deny']);
    latencies.push(performance.now() - started);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  console.log(`file to push, ms: ${latencies.map((ms) => ms.toFixed(0)).join(' ')}`);
  expect(Math.max(...latencies)).toBeLessThan(1000);
});

test('a bad file is reported with its place and leaves what was; mended, it counts', async () => {
  write('nodes.yaml', NODES);
  write('policy.yaml', DENY);
  run();
  const stream = await open();
  stream.subscribe(AUTHORIZATION);
  expect(summary(await stream.nextAcked())).toEqual(['+shop/deny']);
  write('policy.yaml', 'apiVersion: security.istio.io/v1\nkind: [\n');
  const problem = await event('manifest_problem');
  expect(problem).toMatchObject({
    file: join(directory, 'manifests/policy.yaml'),
    line: expect.any(Number),
    column: expect.any(Number),
  });
  expect(await stream.poll(500)).toBeUndefined();
  write('policy.yaml', DENY.replace('evil', 'worse'));
  expect(summary(await stream.nextAcked())).toEqual(['+shop/deny']);
  rmSync(join(directory, 'manifests/policy.yaml'));
  expect(summary(await stream.nextAcked())).toEqual(['-shop/deny']);
});

test('at the very first start a policy that cannot be read refuses everything, until it is mended', async () => {
  write('nodes.yaml', NODES);
  write('policy.yaml', 'kind: [AuthorizationPolicy');
  run();
  await event('refusing_all');
  const stream = await open();
  stream.subscribe(AUTHORIZATION);
  expect(summary(await stream.nextAcked())).toEqual(['+istio-system/ebbtide-unreadable-manifest']);
  write('policy.yaml', DENY);
  const mended = [...summary(await stream.nextAcked()), ...summary(await stream.nextAcked())];
  expect(mended).toEqual(['+shop/deny', '-istio-system/ebbtide-unreadable-manifest']);
});

test('a bad file that holds no policy keeps nothing from being served', async () => {
  write('nodes.yaml', NODES);
  write('other.yaml', 'kind: [');
  run();
  const stream = await open();
  stream.subscribe(AUTHORIZATION);
  expect(summary(await stream.nextAcked())).toEqual([]);
  expect(events('manifest_problem')[0]).toMatchObject({ line: 1, msg: expect.stringMatching(/other\.yaml:1:\d+: /) });
});

test('a policy stays in force over a restart with its file broken', async () => {
  write('nodes.yaml', NODES);
  write('policy.yaml', DENY);
  run();
  await event('listening');
  child.kill('SIGTERM');
  await once(child, 'exit');
  write('policy.yaml', 'kind: [AuthorizationPolicy');
  lines = [];
  run();
  const stream = await open();
  stream.subscribe(AUTHORIZATION);
  expect(summary(await stream.nextAcked())).toEqual(['+shop/deny']);
});

test.each(['SIGTERM', 'SIGINT'] as const)('%s ends it cleanly, with a stream open', async (signal) => {
  write('nodes.yaml', NODES);
  run();
  const stream = await open();
  stream.subscribe(ADDRESS);
  await stream.nextAcked();
  child.kill(signal);
  expect(await once(child, 'exit')).toEqual([0, null]);
  expect(events('stopped')).toHaveLength(1);
});

test.each([
  [['--ttl', '0s'], /--ttl "0s": expected a duration/],
  [['--listen', 'localhost:1'], /expected ADDRESS:PORT/],
  [['--trust-domain', 'a/b'], /--trust-domain "a\/b"/],
  [['--manifests', '/nonexistent'], /cannot read the folder of manifests/],
])('%j cannot be used: exit code 1 and a reason', async (extra, reason) => {
  run(...extra);
  expect(await once(child, 'exit')).toEqual([1, null]);
  expect(events('failed')[0]?.msg).toMatch(reason);
});

test('an address in use is named; nothing keeps the process alive', async () => {
  write('nodes.yaml', NODES);
  run();
  const { port } = await event('listening');
  const first = child;
  lines = [];
  run('--listen', `127.0.0.1:${port}`, '--data', join(directory, 'other'));
  expect(await once(child, 'exit')).toEqual([1, null]);
  expect(events('failed')[0]?.msg).toMatch(/cannot listen on 127\.0\.0\.1/);
  expect(existsSync(join(directory, 'other/root-cert.pem'))).toBe(true);
  child = first;
});
