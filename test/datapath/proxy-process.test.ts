/** The proxy as a process, with the real engine, the real controller and a scripted agent: pods in, ready, certificate, out. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { listenSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import type { SeqpacketConnection, SeqpacketServer } from '../../src/mesh/seqpacket.ts';

const { WorkloadRequest, WorkloadResponse } = istio.workload.zds;
const EBBTIDE = fileURLToPath(new URL('../../dist/main.js', import.meta.url));
const NODE = `ebD-node-${process.pid}`;
const POD = `ebD-pod-${process.pid}`;
const MANIFEST = `
apiVersion: v1
kind: Namespace
metadata: {name: n, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: node1}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: n, uid: u1}
spec: {nodeName: node1, serviceAccountName: sa}
status: {phase: Running, podIP: 10.99.0.1, podIPs: [{ip: 10.99.0.1}]}
`;

let directory: string;
let children: ChildProcess[];
let server: SeqpacketServer | undefined;
let connection: SeqpacketConnection | undefined;
const packets: Buffer[] = [];

const ip = (...argv: string[]): string => execFileSync('ip', argv, { stdio: 'pipe' }).toString();
async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 20_000;
  while (!condition()) {
    if (Date.now() > deadline) {
      const log = join(directory, 'proxy.log');
      throw new Error(`waited 20 s for ${what}\n${existsSync(log) ? readFileSync(log, 'utf8') : ''}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function start(name: string, args: string[], env: NodeJS.ProcessEnv = {}): ChildProcess {
  const log = openSync(join(directory, `${name}.log`), 'w');
  const child = spawn('ip', ['netns', 'exec', NODE, process.execPath, EBBTIDE, ...args], {
    env: { ...process.env, ...env },
    stdio: ['ignore', log, log],
  });
  closeSync(log);
  children.push(child);
  return child;
}

const curl = (...argv: string[]): string => {
  try {
    return ip('netns', 'exec', NODE, 'curl', '-s', '--max-time', '3', ...argv);
  } catch {
    return '';
  }
};

async function ask(request: istio.workload.zds.WorkloadRequest.$Properties, fd?: number): Promise<string> {
  const seen = packets.length;
  await connection?.send(WorkloadRequest.encode(request).finish(), ...(fd === undefined ? [] : [fd]));
  await until(() => packets.length > seen, 'an Ack');
  return WorkloadResponse.decode(packets[seen] as Buffer).ack?.error ?? 'no Ack';
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'proxy-process-'));
  children = [];
  for (const netns of [NODE, POD]) {
    ip('netns', 'add', netns);
    ip('-n', netns, 'link', 'set', 'lo', 'up');
  }
});
afterEach(async () => {
  connection?.close();
  server?.close();
  for (const child of children) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
  }
  for (const netns of [NODE, POD]) ip('netns', 'del', netns);
  rmSync(directory, { recursive: true, force: true });
});

it('opens a pod’s listeners before it acknowledges, fetches the certificate, is ready, and stops cleanly', async () => {
  const manifests = join(directory, 'manifests');
  const data = join(directory, 'data');
  mkdirSync(manifests);
  writeFileSync(join(manifests, 'all.yaml'), MANIFEST);
  server = listenSeqpacket(join(directory, 'zds.sock'), (accepted) => {
    connection = accepted;
    accepted.onMessage(({ data: bytes }) => packets.push(bytes));
  });
  start('controller', ['controller', '--manifests', manifests, '--data', data]);
  // Started before the controller has written what it needs: it must find its way.
  const proxy = start('proxy', ['proxy'], {
    NODE_NAME: 'node1',
    XDS_ADDRESS: '127.0.0.1:15012',
    XDS_ROOT_CA: join(data, 'root-cert.pem'),
    CA_ROOT_CA: join(data, 'root-cert.pem'),
    AUTH_TOKEN: join(data, 'tokens', 'node1'),
    INPOD_UDS: join(directory, 'zds.sock'),
  });
  await until(() => packets.length === 1, 'hello');
  const netns = openSync(`/run/netns/${POD}`, 'r');
  const workloadInfo = { name: 'a', namespace: 'n', serviceAccount: 'sa' };
  const error = await ask({ add: { uid: 'u1', workloadInfo } }, netns);
  closeSync(netns);
  expect(error).toBe('');
  const listeners = ip('netns', 'exec', POD, 'ss', '-Hltn');
  for (const port of [15001, 15006, 15008]) expect(listeners).toContain(`:${port} `);

  expect(await ask({ snapshotSent: {} })).toBe('');
  await until(() => curl('http://127.0.0.1:15021/healthz/ready') === 'ready\n', 'readiness');
  await until(() => curl('http://[::1]:15020/metrics').includes('workload_manager_active_proxy_count 1'), 'metrics');
  const identity = 'spiffe://cluster.local/ns/n/sa/sa';
  await until(() => {
    const dump = curl('http://127.0.0.1:15000/config_dump');
    if (dump === '') return false;
    const { certificates } = JSON.parse(dump) as { certificates: { identity: string; state: string }[] };
    return certificates.some((certificate) => certificate.identity === identity && certificate.state === 'Available');
  }, 'the certificate');
  expect(Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${proxy.pid}/status`, 'utf8'))?.[1])).toBeLessThan(90_000);

  expect(await ask({ del: { uid: 'u1' } })).toBe('');
  await until(() => !ip('netns', 'exec', POD, 'ss', '-Hltn').includes(':1500'), 'the listeners to close');
  const ended = new Promise((resolve) => proxy.once('exit', (code) => resolve(code)));
  proxy.kill('SIGTERM');
  expect(await ended).toBe(0);
});
