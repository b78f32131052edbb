/**
 * The agent as the chart runs it: in a network of its own, away from that of the node, where the pods' veths and the kubelet
 * are. And new pods: held until they are captured, or free at once.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, expect, it, vi } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { OUTSIDE, run } from '../datapath/capture/lab.ts';
import { AgentProcess, ZdsProxy } from './lib/agent-process.js';
import { type ApiServer, startApiServer } from './lib/api-server.js';
import { BareNode, type BarePod } from './lib/bare-node.js';

const NODE = 'node-p';
/** The node's address on the lab's bridge, by which the agent's own network reaches the API server. */
const NODE_ADDRESS = '10.231.0.1';

let server: ApiServer;
let node: BareNode;
let agent: AgentProcess;
let kubelet: Server;
let relay: Server | undefined;
let socket: string;
let number = 10;
let proxy: ZdsProxy | undefined;

const eventually = <T>(check: () => T | Promise<T>) => vi.waitFor(check, { timeout: 30_000, interval: 50 });
const statusOf = async (pod: BarePod) => (await readStatus(`${socket}.status`)).pods.find(({ uid }) => uid === pod.uid);

beforeAll(async () => {
  // What stands for the kubelet: root's, of no pod, in the network of the node, listening on its port.
  kubelet = createServer();
  await new Promise<void>((resolve) => {
    kubelet.listen(0, '127.0.0.1', resolve);
  });
  const kubeletPort = (kubelet.address() as { port: number }).port;
  server = await startApiServer({ flags: ['--disable-admission-plugins=ServiceAccount'] });
  node = await BareNode.make(server.api, NODE);
  run('ip', 'address', 'add', `${NODE_ADDRESS}/24`, 'dev', node.lab.bridge);
  const own = node.lab.addNamespace('ag', '10.231.0.250', 'fd31::fa');
  await node.lab.startOutside('serve', OUTSIDE.ip4, '8080');
  for (const name of ['team', 'plain']) await node.namespace(name, name === 'team' ? 'ambient' : undefined);
  socket = join(node.lab.directory, 'run', 'zds.sock');
  const bpffs = node.lab.pinDirectory('');
  mkdirSync(bpffs);
  run('mount', '-t', 'bpf', 'bpf', bpffs);
  const argv = ['--kubeconfig', await reachable()];
  argv.push('--bpffs', bpffs, '--port', '0', '--pod-cgroup', node.cgroup, '--kubelet-port', `${kubeletPort}`);
  agent = new AgentProcess(argv, { NODE_NAME: NODE, INPOD_UDS: socket }, `/var/run/netns/${own}`);
  await agent.logged('started');
});
afterEach(async () => {
  proxy?.close();
  for (const pod of node.pods.splice(0)) await pod.remove().catch(() => pod.end());
});
afterAll(async () => {
  await agent?.end('SIGKILL');
  kubelet?.close();
  relay?.close();
  await node?.remove();
  await server?.close();
});

/** A way from the lab's bridge to the API server, which listens on loopback. @returns a kubeconfig that names it */
async function reachable(): Promise<string> {
  relay = createServer((socket) => {
    const onward = connect(server.port, '127.0.0.1');
    for (const [from, to] of [
      [socket, onward],
      [onward, socket],
    ] as const) {
      from.pipe(to);
      from.on('error', () => to.destroy());
    }
  });
  await new Promise<void>((resolve) => {
    relay?.listen(0, NODE_ADDRESS, resolve);
  });
  const { port } = relay.address() as { port: number };
  const path = server.kubeconfig(undefined, `https://${NODE_ADDRESS}:${port}`);
  const config = JSON.parse(readFileSync(path, 'utf8')) as { clusters: { cluster: Record<string, string> }[] };
  for (const { cluster } of config.clusters) cluster['tls-server-name'] = 'kubernetes.default.svc';
  writeFileSync(path, JSON.stringify(config));
  return path;
}

const pod = (name: string, namespace: string) => node.pod({ name, namespace, number: number++ });

it('finds the kubelet and by it the network of the node, so that pods are guarded there', async () => {
  expect(await agent.logged('kubelet_found')).toMatchObject({ pid: process.pid });
  expect(await agent.logged('capture_open')).toMatchObject({ hostNetns: `/proc/${process.pid}/ns/net` });
  const one = await (await pod('one', 'team')).run();
  await eventually(async () =>
    expect(await statusOf(one)).toMatchObject({
      state: 'captured',
      capture: { outbound: true, inbound: true, guard: 'attached' },
    }),
  );
  // A second agent of the same node finds it guarded, too, and lets it go there.
  await node.labelNamespace('team', null);
  await eventually(async () => expect(await statusOf(one)).toMatchObject({ state: 'not enrolled' }));
  expect(one.lab?.connect(OUTSIDE.ip4, 8080).ok).toBe(true);
  await node.labelNamespace('team', 'ambient');
});

it('refuses a proxy that is in the network of the node, since that is another one than the agent’s', async () => {
  proxy = new ZdsProxy(socket);
  await eventually(() => expect(proxy?.closed).toBe(true));
  expect(await agent.logged('zds_refused')).toMatchObject({ proxy: process.pid });
});

it('holds a new pod of the mesh from its first instant, and never one of another namespace', async () => {
  const free = await pod('free', 'plain');
  const held = await pod('held', 'team');
  await eventually(async () => expect((await statusOf(held))?.reason).toBe('has no address yet'));
  for (const each of [free, held]) {
    each.makeNetwork();
    await each.startProcess();
  }
  // Both are decided about, and no agent knows their addresses yet.
  expect(free.runInside('connect', OUTSIDE.ip4, '8080').ok).toBe(true);
  const outcome = held.runInside('connect', OUTSIDE.ip4, '8080');
  expect(outcome.ok).not.toBe(true);
  expect(await statusOf(held)).toMatchObject({ held: { verdict: 'mesh', held: true } });
  await held.reportRunning();
  await eventually(async () =>
    expect(await statusOf(held)).toMatchObject({ state: 'captured', held: { held: false } }),
  );
  expect(held.runInside('connect', OUTSIDE.ip4, '8080').ok).toBe(false);
  const { text } = await scrape();
  expect(text).toMatch(/ebbtide_agent_held_pods 0/);
  expect(text).toMatch(/ebbtide_agent_held_duration_seconds_count [1-9]/);
  expect(text).toMatch(/ebbtide_agent_held_connects_delayed_total [1-9]/);
});

/** The agent's port is in the agent's own network. */
async function scrape(): Promise<{ readonly text: string }> {
  const { port } = (await agent.logged('http_listening')) as { port: number };
  const response = await fetch(`http://10.231.0.250:${port}/metrics`);
  return { text: await response.text() };
}
