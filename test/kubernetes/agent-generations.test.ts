/** Two generations of the agent on one node, and what its end means: an upgrade, or the DaemonSet going away. */
import { mkdirSync, mkdtempSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, expect, it, vi } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { bpfObjects, OUTSIDE, run } from '../datapath/capture/lab.ts';
import { AgentProcess, ZdsProxy } from './lib/agent-process.js';
import { type ApiServer, startApiServer } from './lib/api-server.js';
import { BareNode, type BarePod } from './lib/bare-node.js';

const NODE = 'node-g';
const SYSTEM = 'mesh-system';
const DAEMONSETS = `/apis/apps/v1/namespaces/${SYSTEM}/daemonsets`;
const OWN = { POD_NAME: 'ebbtide-node-x', POD_NAMESPACE: SYSTEM };

let server: ApiServer;
let node: BareNode;
let socket: string;
let bpffs: string;
let pod: BarePod;
let before: ReturnType<typeof bpfObjects>;
let number = 10;
const agents: AgentProcess[] = [];
const proxies: ZdsProxy[] = [];

function startAgent(env: NodeJS.ProcessEnv = OWN, ...flags: string[]): AgentProcess {
  const argv = [
    '--kubeconfig',
    server.kubeconfig(),
    '--bpffs',
    bpffs,
    '--port',
    '0',
    '--pod-cgroup',
    node.cgroup,
    ...flags,
  ];
  const started = new AgentProcess(argv, { NODE_NAME: NODE, INPOD_UDS: socket, ...env });
  agents.push(started);
  return started;
}
function connectProxy(): ZdsProxy {
  const connected = new ZdsProxy(socket);
  proxies.push(connected);
  return connected;
}
const eventually = <T>(check: () => T | Promise<T>) => vi.waitFor(check, { timeout: 30_000, interval: 50 });
const goesOut = (): boolean => pod.lab?.connect(OUTSIDE.ip4, 8080).ok === true;
const captured = () =>
  eventually(async () => {
    const { pods } = await readStatus(`${socket}.status`);
    expect(pods.find(({ uid }) => uid === pod.uid)).toMatchObject({ state: 'captured' });
  });
const annotated = (value: string | undefined) => eventually(async () => expect(await pod.redirection()).toBe(value));

/** Counts connections that got out while the pod should have been captured. */
function watchGaps(): () => number {
  let gaps = 0;
  const timer = setInterval(() => {
    if (goesOut()) gaps++;
  }, 20);
  return () => {
    clearInterval(timer);
    return gaps;
  };
}

/** A DaemonSet, and the agent's own pod as its. */
async function makeDaemonSet(): Promise<void> {
  const template = {
    metadata: { labels: { app: 'x' } },
    spec: { containers: [{ name: 'agent', image: 'none', imagePullPolicy: 'Never' }] },
  };
  const made = await server.api.request<{ metadata: { uid: string } }>('POST', DAEMONSETS, {
    body: { metadata: { name: 'ebbtide-node' }, spec: { selector: { matchLabels: { app: 'x' } }, template } },
  });
  const ownerReferences = [
    { apiVersion: 'apps/v1', kind: 'DaemonSet', name: 'ebbtide-node', uid: made.metadata.uid, controller: true },
  ];
  await server.api.request('POST', `/api/v1/namespaces/${SYSTEM}/pods`, {
    body: { metadata: { name: OWN.POD_NAME, ownerReferences }, spec: { ...template.spec, nodeName: NODE } },
  });
}

beforeAll(async () => {
  before = bpfObjects();
  server = await startApiServer({ flags: ['--disable-admission-plugins=ServiceAccount'] });
  node = await BareNode.make(server.api, NODE);
  bpffs = node.lab.pinDirectory('');
  mkdirSync(bpffs);
  run('mount', '-t', 'bpf', 'bpf', bpffs);
  await node.lab.startOutside('serve', OUTSIDE.ip4, '8080');
  await node.namespace('team', 'ambient');
  await node.namespace(SYSTEM);
});
beforeEach(async () => {
  socket = join(mkdtempSync(join(node.lab.directory, 'run-')), 'zds.sock');
  await makeDaemonSet();
  pod = await (await node.pod({ name: 'one', namespace: 'team', number: number++ })).run();
});
afterEach(async () => {
  for (const each of proxies.splice(0)) each.close();
  for (const each of agents.splice(0)) await each.end('SIGKILL');
  run('node', join(process.cwd(), 'dist/main.js'), 'uninstall', '--bpffs', bpffs);
  for (const each of node.pods.splice(0)) await each.remove();
  await server.api.request('DELETE', `${DAEMONSETS}/ebbtide-node`).catch(() => {});
  const own = `/api/v1/namespaces/${SYSTEM}/pods/${OWN.POD_NAME}`;
  await server.api.request('DELETE', own, { body: { gracePeriodSeconds: 0 } }).catch(() => {});
});
afterAll(async () => {
  await node?.remove();
  await server?.close();
});

it('the next agent gets the node, the one before stands by and takes it back when the next one ends', async () => {
  const first = startAgent();
  await first.logged('started');
  const proxy = connectProxy();
  await annotated('enabled');
  const gaps = watchGaps();

  const second = startAgent();
  await second.logged('started');
  await first.logged('handed_over');
  expect(second.events('pod_adopted')).toMatchObject([{ uid: pod.uid, state: 'captured' }]);
  await eventually(() => expect(proxy.closed).toBe(true));
  // Its proxy finds the new agent at the same path.
  const again = connectProxy();
  await eventually(() => expect(again.got).toEqual([`add ${pod.uid}`, 'snapshotSent']));
  await captured();
  expect((await first.get('/readyz')).status).toBe(200);
  expect((await first.get('/metrics')).text).toMatch(/ebbtide_agent_active 0/);
  await eventually(async () => expect((await second.get('/readyz')).text).toBe('ready\n'));

  // What a new version that cannot stay up does, again and again.
  await second.end('SIGKILL');
  await eventually(() => expect(first.events('started')).toHaveLength(2));
  await captured();
  const third = startAgent();
  await third.logged('started');
  await captured();
  // The old one ends at last, as Kubernetes has it: nothing of the new one's is touched.
  expect(await first.end('SIGTERM')).toBe(0);
  await captured();
  connectProxy();
  await eventually(async () => {
    const { proxies: pids } = await readStatus(`${socket}.status`);
    expect(pids).toEqual([process.pid]);
  });
  expect(gaps()).toBe(0);
  expect(await pod.redirection()).toBe('enabled');
});

it('never do two have it: one that does not give it keeps it, and the other waits without touching anything', async () => {
  const first = startAgent(OWN, '--no-take-over');
  await first.logged('started');
  const second = startAgent();
  await second.logged('node_not_taken');
  expect(second.events('capture_open')).toEqual([]);
  const answer = await second.get('/readyz');
  expect(answer).toEqual({ status: 503, text: 'not ready, pending: the node, which another agent has\n' });
  const third = startAgent(OWN, '--no-take-over');
  expect(await third.exit).toBe(1);
  expect(third.output).toMatch(/another agent uses it/);
  await captured();
  await first.end('SIGKILL');
  await second.logged('started');
  await captured();
});

it('ends and keeps the pods captured while its DaemonSet stays', async () => {
  const agent = startAgent();
  await agent.logged('daemonset_found');
  await agent.logged('started');
  connectProxy();
  await annotated('enabled');
  expect(await agent.end('SIGTERM')).toBe(0);
  expect(agent.events('ending')).toMatchObject([{ keep: true, reason: `DaemonSet ${SYSTEM}/ebbtide-node stays` }]);
  expect(goesOut()).toBe(false);
  expect(await pod.redirection()).toBe('enabled');
});

it('ends and lets everything go when its DaemonSet was deleted: annotation first, then capture, nothing left', async () => {
  const agent = startAgent();
  await agent.logged('daemonset_found');
  await agent.logged('started');
  connectProxy();
  await annotated('enabled');
  await server.api.request('DELETE', `${DAEMONSETS}/ebbtide-node`);
  expect(await agent.end('SIGTERM')).toBe(0);
  expect(agent.events('ending')).toMatchObject([{ keep: false, reason: `DaemonSet ${SYSTEM}/ebbtide-node is gone` }]);
  expect(await pod.redirection()).toBeUndefined();
  expect(goesOut()).toBe(true);
  expect(readdirSync(bpffs)).not.toContain(`ebbtide-${NODE}`);
  await eventually(() => {
    const now = bpfObjects();
    for (const [kind, ids] of Object.entries(now)) expect(ids.filter((id) => !before[kind]?.includes(id))).toEqual([]);
  });
});

it('is told of its end while the API server is away: keeps the pods captured, in time', async () => {
  const agent = startAgent();
  await agent.logged('daemonset_found');
  await agent.logged('started');
  await captured();
  await server.stopServer('SIGKILL');
  const begun = performance.now();
  expect(await agent.end('SIGTERM')).toBe(0);
  expect(performance.now() - begun).toBeLessThan(20_000);
  expect(goesOut()).toBe(false);
  await server.startServer();
});

it('starts while the API server is away: what was captured stays so and is told to the proxy', async () => {
  const first = startAgent();
  await first.logged('started');
  await captured();
  await first.end('SIGKILL');
  await server.stopServer('SIGKILL');
  const second = startAgent();
  await second.logged('started');
  expect(goesOut()).toBe(false);
  const proxy = connectProxy();
  await eventually(() => expect(proxy.got).toEqual([`keep ${pod.uid}`, 'snapshotSent']));
  expect((await second.get('/readyz')).text).toMatch(/the pods and namespaces of the cluster/);
  await server.startServer();
  await annotated('enabled');
  await eventually(async () => expect((await second.get('/readyz')).text).toBe('ready\n'));
});
