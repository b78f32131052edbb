/** The agent as a process, with real pods, the real capture and a ZDS client in the place of the proxy. */
import { spawn } from 'node:child_process';
import { closeSync, existsSync, fstatSync, mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import { stringify } from 'yaml';
import { readStatus } from '../../src/agent/status.ts';
import { connectSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import { bpfObjects, CaptureLab, type LabPod, OUTSIDE, run } from './capture/lab.ts';

const EBBTIDE = fileURLToPath(new URL('../../dist/main.js', import.meta.url));
const { WorkloadRequest, WorkloadResponse, ZdsHello } = istio.workload.zds;
const NODE = 'node-c.example';

let lab: CaptureLab;
let pod: LabPod;
let before: ReturnType<typeof bpfObjects>;
let socket: string;
let bpffs: string;
let manifests: string;
const agents: Agent[] = [];
const clients: ZdsClient[] = [];

class Agent {
  output = '';
  readonly process;
  readonly exit: Promise<number | string>;

  constructor(...flags: string[]) {
    const argv = [EBBTIDE, 'agent', '--manifests', manifests, '--bpffs', bpffs, ...flags];
    this.process = spawn(process.execPath, argv, { env: { ...process.env, NODE_NAME: NODE, INPOD_UDS: socket } });
    this.process.stdout.on('data', (chunk) => {
      this.output += String(chunk);
    });
    this.process.stderr.on('data', (chunk) => {
      this.output += String(chunk);
    });
    this.exit = new Promise((resolve) => {
      this.process.once('exit', (code, signal) => resolve(signal ?? code ?? -1));
    });
    agents.push(this);
  }
  async started(): Promise<this> {
    await vi.waitFor(() => expect(this.output).toContain('"event":"started"'), { timeout: 15_000 });
    return this;
  }
  async end(signal: NodeJS.Signals): Promise<number | string> {
    this.process.kill(signal);
    return await this.exit;
  }
}

class ZdsClient {
  readonly got: string[] = [];
  readonly inodes: number[] = [];
  readonly socket = connectSeqpacket(socket);

  constructor() {
    clients.push(this);
    this.socket.onMessage(({ data, fds }) => {
      const { add, del, keep } = WorkloadRequest.decode(data);
      this.got.push(add ? `add ${add.uid}` : del ? `del ${del.uid}` : keep ? `keep ${keep.uid}` : 'snapshotSent');
      for (const fd of fds) {
        this.inodes.push(fstatSync(fd).ino);
        closeSync(fd);
      }
      void this.socket.send(WorkloadResponse.encode({ ack: {} }).finish());
    });
    void this.socket.send(ZdsHello.encode({ version: 1 }).finish());
  }
}

function write(name: string, object: unknown): void {
  writeFileSync(join(manifests, name), stringify(object));
}
function writeNamespace(mode: string): void {
  const metadata = { name: 'team', labels: { 'istio.io/dataplane-mode': mode } };
  write('namespace.yaml', { apiVersion: 'v1', kind: 'Namespace', metadata });
}
function writePod(netns = pod.path): void {
  const annotations = { 'ebbtide.dev/netns': netns };
  write('pod.yaml', {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name: 'a', namespace: 'team', uid: pod.pod.uid, annotations },
    spec: { nodeName: NODE, serviceAccountName: 'client' },
    status: { phase: 'Running', podIPs: pod.pod.addresses.map((ip) => ({ ip })) },
  });
}
/** Whether a connection of the pod gets out as it would without a mesh. */
const goesOut = (): boolean => pod.connect(OUTSIDE.ip4, 8080).ok === true;
const statusOf = async () => (await readStatus(`${socket}.status`)).pods.find(({ uid }) => uid === pod.pod.uid);
const eventually = (check: () => unknown) => vi.waitFor(check, { timeout: 10_000, interval: 20 });

beforeEach(async () => {
  before = bpfObjects();
  lab = new CaptureLab();
  bpffs = lab.pinDirectory('');
  socket = join(lab.directory, 'run', 'zds.sock');
  manifests = join(lab.directory, 'manifests');
  mkdirSync(bpffs);
  mkdirSync(manifests);
  run('mount', '-t', 'bpf', 'bpf', bpffs);
  pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
  await lab.startOutside('serve', OUTSIDE.ip4, '8080');
  writeNamespace('ambient');
  writePod();
});
afterEach(async () => {
  for (const { socket: connection } of clients.splice(0)) connection.close();
  for (const agent of agents.splice(0)) await agent.end('SIGKILL');
  await lab?.remove();
});

it('captures, tells the proxy with the descriptor, and lets go when the namespace is un-labelled', async () => {
  expect(goesOut()).toBe(true);
  await new Agent().started();
  expect(statSync(socket).mode & 0o777).toBe(0o600);
  expect(statSync(`${socket}.status`).mode & 0o777).toBe(0o600);
  expect(await statusOf()).toMatchObject({ state: 'captured', reason: 'waiting for proxy', wanted: true });
  // Nobody listens: closed, not open.
  expect(goesOut()).toBe(false);

  const client = new ZdsClient();
  await eventually(() => expect(client.got).toEqual([`add ${pod.pod.uid}`, 'snapshotSent']));
  expect(client.inodes).toEqual([statSync(pod.path).ino]);
  expect(await statusOf()).toMatchObject({ state: 'captured', reason: '', capture: { outbound: true, inbound: true } });
  expect((await readStatus(`${socket}.status`)).proxies).toEqual([process.pid]);

  writeNamespace('none');
  await eventually(() => expect(client.got.at(-1)).toBe(`del ${pod.pod.uid}`));
  expect(goesOut()).toBe(true);
  expect(await statusOf()).toMatchObject({ state: 'not enrolled', reason: 'not labelled', wanted: false });

  writeNamespace('ambient');
  await eventually(() => expect(client.got.at(-1)).toBe(`add ${pod.pod.uid}`));
  await eventually(async () => expect(await statusOf()).toMatchObject({ state: 'captured', reason: '' }));
  expect(goesOut()).toBe(false);

  rmSync(join(manifests, 'pod.yaml'));
  await eventually(() => expect(client.got.at(-1)).toBe(`del ${pod.pod.uid}`));
  await eventually(() => expect(goesOut()).toBe(true));
});

it('killed, leaves pods captured; started again, adopts them without a gap and tells the proxy anew', async () => {
  const first = await new Agent().started();
  expect(await first.end('SIGKILL')).toBe('SIGKILL');
  expect(goesOut()).toBe(false);

  const second = new Agent();
  let gaps = 0;
  while (!second.output.includes('"event":"started"') && second.process.exitCode === null) {
    if (goesOut()) gaps++;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  expect(gaps).toBe(0);
  expect(second.output).toContain('"event":"pod_adopted"');
  const client = new ZdsClient();
  await eventually(() => expect(client.got).toEqual([`add ${pod.pod.uid}`, 'snapshotSent']));
  expect(goesOut()).toBe(false);
});

it('while it is away a pod is un-labelled: let go by the next one; deleted: likewise', async () => {
  await (await new Agent().started()).end('SIGKILL');
  writeNamespace('none');
  const second = await new Agent().started();
  await eventually(() => expect(goesOut()).toBe(true));
  writeNamespace('ambient');
  await eventually(() => expect(goesOut()).toBe(false));
  await second.end('SIGKILL');
  rmSync(join(manifests, 'pod.yaml'));
  writeFileSync(join(manifests, 'bad.yaml'), 'kind: [');
  await new Agent().started();
  // It may be in the file that cannot be read.
  expect(goesOut()).toBe(false);
  rmSync(join(manifests, 'bad.yaml'));
  await eventually(() => expect(goesOut()).toBe(true));
});

it('told to guard by clsact does so also where the kernel has tcx, and takes it away at the end', async () => {
  const filters = (): string => lab.guardFilters('a');
  const agent = await new Agent('--guard', 'clsact').started();
  await eventually(async () => expect(await statusOf()).toMatchObject({ capture: { guard: 'attached' } }));
  expect(filters()).toContain('ebb_guard');
  expect(await agent.end('SIGTERM')).toBe(0);
  expect(filters()).toBe('');
});

it('stopped, leaves nothing behind; with --keep, everything', async () => {
  const first = await new Agent('--keep').started();
  expect(await first.end('SIGTERM')).toBe(0);
  expect(goesOut()).toBe(false);
  const second = await new Agent().started();
  const client = new ZdsClient();
  await eventually(() => expect(client.got).toContain('snapshotSent'));
  expect(await second.end('SIGINT')).toBe(0);
  expect(client.got.at(-1)).toBe(`del ${pod.pod.uid}`);
  expect(goesOut()).toBe(true);
  expect(existsSync(socket)).toBe(false);
  expect(existsSync(join(bpffs, 'ebbtide-node-c_example'))).toBe(false);
  await eventually(() => {
    const now = bpfObjects();
    const own = Object.entries(now).map(([kind, ids]) => [kind, ids.filter((id) => !before[kind]?.includes(id))]);
    expect(own).toEqual([
      ['prog', []],
      ['link', []],
      ['map', []],
    ]);
  });
});

it('does not capture a namespace that is not the pod’s, and says which addresses it found', async () => {
  const other = lab.addPod('b', '10.231.0.3', 'fd31::3');
  writePod(other.path);
  await new Agent().started();
  const status = await statusOf();
  expect(status).toMatchObject({ state: 'waiting', wanted: true });
  expect(status?.reason).toMatch(/none of the pod's addresses 10\.231\.0\.2.*10\.231\.0\.3/);
  expect(other.connect(OUTSIDE.ip4, 8080).ok).toBe(true);
  writePod('/proc/self/ns/net');
  await eventually(async () => expect((await statusOf())?.reason).toMatch(/of the node itself/));
  expect(goesOut()).toBe(true);
  writePod();
  await eventually(async () => expect((await statusOf())?.state).toBe('captured'));
});

it('refuses to start beside another agent on the same socket, which goes on undisturbed', async () => {
  await new Agent().started();
  const second = new Agent();
  expect(await second.exit).toBe(1);
  expect(second.output).toMatch(/another (agent|process)/);
  expect(goesOut()).toBe(false);
  expect(await statusOf()).toMatchObject({ state: 'captured' });
});
