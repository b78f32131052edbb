/** The agent on a real API server, with rights as narrow as in a cluster, and pods made by hand of real namespaces. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, expect, it, vi } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { OUTSIDE, run } from '../datapath/capture/lab.ts';
import { AgentProcess, ZdsProxy } from './lib/agent-process.js';
import { type ApiServer, startApiServer } from './lib/api-server.js';
import { BareNode, type BarePod } from './lib/bare-node.js';

const NODE = 'node-k.example';
const TOKEN = 'agents-token';

let server: ApiServer;
let node: BareNode;
let socket: string;
let bpffs: string;
let agent: AgentProcess;
let proxy: ZdsProxy;
let number = 10;
const agents: AgentProcess[] = [];
const proxies: ZdsProxy[] = [];

function startAgent(env: NodeJS.ProcessEnv = {}, ...flags: string[]): AgentProcess {
  const argv = [
    '--kubeconfig',
    server.kubeconfig(TOKEN),
    '--bpffs',
    bpffs,
    '--port',
    '0',
    '--pod-cgroup',
    node.cgroup,
    ...flags,
  ];
  const started = new AgentProcess(argv, {
    NODE_NAME: NODE,
    INPOD_UDS: socket,
    EXCLUDE_NAMESPACES: 'system, other',
    ...env,
  });
  agents.push(started);
  return started;
}
function connectProxy(): ZdsProxy {
  const connected = new ZdsProxy(socket);
  proxies.push(connected);
  return connected;
}
const eventually = <T>(check: () => T | Promise<T>) => vi.waitFor(check, { timeout: 30_000, interval: 50 });
const statusOf = async (pod: BarePod) => (await readStatus(`${socket}.status`)).pods.find(({ uid }) => uid === pod.uid);
const captured = (pod: BarePod) =>
  eventually(async () => expect(await statusOf(pod)).toMatchObject({ state: 'captured', reason: '' }));
const annotated = (pod: BarePod, value: string | undefined) =>
  eventually(async () => expect(await pod.redirection()).toBe(value));
/** Whether a connection of the pod gets out as it would without a mesh. */
const goesOut = (pod: BarePod): boolean => pod.lab?.connect(OUTSIDE.ip4, 8080).ok === true;
const eventsOf = async (pod: BarePod) => {
  const { items } = await server.api.request<{
    items: { reason: string; type: string; message: string; count: number; involvedObject: { uid: string } }[];
  }>('GET', `/api/v1/namespaces/${pod.namespace}/events`);
  return items.filter(({ involvedObject }) => involvedObject.uid === pod.uid);
};

/** The rights of the chart's service account. */
async function giveRights(): Promise<void> {
  const rules = [
    { apiGroups: [''], resources: ['pods', 'namespaces'], verbs: ['get', 'list', 'watch'] },
    { apiGroups: [''], resources: ['pods/status'], verbs: ['patch'] },
    { apiGroups: [''], resources: ['events'], verbs: ['create', 'patch'] },
    { apiGroups: ['apps'], resources: ['daemonsets'], verbs: ['get'] },
  ];
  const rbac = '/apis/rbac.authorization.k8s.io/v1';
  await server.api.request('POST', `${rbac}/clusterroles`, { body: { metadata: { name: 'agent' }, rules } });
  await server.api.request('POST', `${rbac}/clusterrolebindings`, {
    body: {
      metadata: { name: 'agent' },
      roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'ClusterRole', name: 'agent' },
      subjects: [{ kind: 'User', name: 'agent' }],
    },
  });
}

beforeAll(async () => {
  server = await startApiServer({
    users: [{ token: TOKEN, user: 'agent' }],
    flags: ['--disable-admission-plugins=ServiceAccount'],
  });
  await giveRights();
  node = await BareNode.make(server.api, NODE);
  socket = join(node.lab.directory, 'run', 'zds.sock');
  bpffs = node.lab.pinDirectory('');
  mkdirSync(bpffs);
  run('mount', '-t', 'bpf', 'bpf', bpffs);
  await node.lab.startOutside('serve', OUTSIDE.ip4, '8080');
  for (const name of ['team', 'system', 'late', 'gone']) await node.namespace(name);
  agent = startAgent();
  await agent.logged('started');
  proxy = connectProxy();
});
afterEach(async () => {
  for (const pod of node.pods.splice(0)) await pod.remove().catch(() => pod.end());
});
afterAll(async () => {
  for (const each of proxies) each.close();
  for (const each of agents) await each.end('SIGKILL');
  await node?.remove();
  await server?.close();
});

const pod = (name: string, namespace = 'team', more: Partial<Parameters<BareNode['pod']>[0]> = {}) =>
  node.pod({ name, namespace, number: number++, ...more });

it.each(['cgroupfs', 'systemd'] as const)(
  'captures running pods of a namespace when it is labelled, says so last, and lets them go again (%s)',
  async (driver) => {
    const one = await (await pod('one', 'team', { driver })).run();
    await eventually(async () => expect(await statusOf(one)).toMatchObject({ state: 'not enrolled', wanted: false }));
    expect(goesOut(one)).toBe(true);
    await node.labelNamespace('team', 'ambient');
    await captured(one);
    await annotated(one, 'enabled');
    expect(proxy.got).toContain(`add ${one.uid}`);
    // Nobody listens for it here: what is captured does not get out by itself.
    expect(goesOut(one)).toBe(false);

    await node.labelNamespace('team', null);
    await annotated(one, undefined);
    await eventually(async () => expect(await statusOf(one)).toMatchObject({ state: 'not enrolled' }));
    expect(goesOut(one)).toBe(true);
    expect(proxy.got.at(-1)).toBe(`del ${one.uid}`);
  },
);

it('captures a pod whose address comes late, by what the runtime mounted before any process is there', async () => {
  await node.labelNamespace('team', 'ambient');
  const late = await pod('late');
  await eventually(async () => expect(await statusOf(late)).toMatchObject({ reason: 'has no address yet' }));
  late.makeNetwork();
  await late.reportRunning('Pending');
  await captured(late);
  await annotated(late, 'enabled');
  await late.startProcess();
  await new Promise((resolve) => setTimeout(resolve, 6000));
  expect(await statusOf(late)).toMatchObject({ state: 'captured', reason: '' });
});

it('takes no namespace in which another pod’s process is, whatever addresses root gave it', async () => {
  const thief = await (await pod('thief', 'system')).run();
  const victim = await pod('victim');
  run('ip', '-n', thief.lab?.netns ?? '', 'address', 'add', `${victim.addresses[0]}/32`, 'dev', 'eth0');
  await victim.reportRunning();
  await eventually(async () => expect((await statusOf(victim))?.reason).toMatch(/not found/));
  expect(proxy.got).not.toContain(`add ${victim.uid}`);
  victim.makeNetwork();
  await victim.startProcess();
  await captured(victim);
  expect(goesOut(thief)).toBe(true);
});

it('follows labels of a pod, and its bypass annotation, while it runs; says what it ignores', async () => {
  const one = await (await pod('one')).run();
  await captured(one);
  await one.label({ 'istio.io/dataplane-mode': 'none' });
  await annotated(one, undefined);
  const optedOut = { state: 'not enrolled', reason: 'pod opts out by label' };
  await eventually(async () => expect(await statusOf(one)).toMatchObject(optedOut));
  expect(goesOut(one)).toBe(true);
  await one.label({ 'istio.io/dataplane-mode': 'ambient' });
  await captured(one);
  await annotated(one, 'enabled');

  await one.lab?.serve(one.addresses[0], 8080);
  const reach = () => node.lab.runOutside('connect', one.addresses[0], '8080').ok;
  expect(reach()).toBe(false);
  await one.annotate({ 'ambient.istio.io/bypass-inbound-capture': 'true' });
  await eventually(() => expect(reach()).toBe(true));
  await one.annotate({ 'ambient.istio.io/bypass-inbound-capture': null, 'ambient.istio.io/dns-capture': 'true' });
  await eventually(() => expect(reach()).toBe(false));
  await eventually(() =>
    expect(agent.events('annotation_ignored').at(-1)).toMatchObject({ uid: one.uid, value: 'true' }),
  );
});

it('captures a pod that opts in, in a namespace that does not; none of an excluded one, none of the node’s network', async () => {
  const labels = { 'istio.io/dataplane-mode': 'ambient' };
  const into = await (await pod('into', 'late', { labels })).run();
  await captured(into);
  const excluded = await (await pod('excluded', 'system', { labels })).run();
  await eventually(async () => expect((await statusOf(excluded))?.reason).toBe('namespace is excluded'));
  const host = await pod('host', 'team', { hostNetwork: true });
  await host.reportRunning();
  await eventually(async () =>
    expect((await statusOf(host))?.reason).toBe('uses the network of the node (hostNetwork)'),
  );
  expect(goesOut(excluded)).toBe(true);
  expect(await host.redirection()).toBeUndefined();
});

it('writes the annotation again when somebody takes it away or changes it', async () => {
  const one = await (await pod('one')).run();
  await annotated(one, 'enabled');
  await one.annotate({ 'ambient.istio.io/redirection': null });
  await annotated(one, 'enabled');
  await one.annotate({ 'ambient.istio.io/redirection': 'rubbish' });
  await annotated(one, 'enabled');
  const plain = await pod('plain', 'gone', { annotations: { 'ambient.istio.io/redirection': 'enabled' } });
  await annotated(plain, undefined);
});

it('lets a pod go that has ended, and tells a pod of the same name that comes after it apart', async () => {
  const first = await (await pod('db-0')).run();
  await annotated(first, 'enabled');
  await first.reportRunning('Succeeded');
  await annotated(first, undefined);
  await eventually(() => expect(proxy.got.at(-1)).toBe(`del ${first.uid}`));
  await first.remove();
  const second = await (await pod('db-0')).run();
  await captured(second);
  await annotated(second, 'enabled');
  // Replaced without a moment between.
  await second.remove();
  const third = await (await pod('db-0')).run();
  await captured(third);
  await annotated(third, 'enabled');
  await eventually(() => expect(proxy.got).toContain(`del ${second.uid}`));
});

it('tells by an Event why a pod is not enrolled while that lasts, and by another when it is', async () => {
  const one = await pod('one');
  await one.reportRunning();
  await annotated(one, 'pending');
  const [failed] = await eventually(async () => {
    const events = await eventsOf(one);
    expect(events).toHaveLength(1);
    return events;
  });
  expect(failed).toMatchObject({ type: 'Warning', reason: 'EbbtideEnrolmentFailed', count: 1 });
  expect(failed?.message).toMatch(/network namespace is not found/);
  one.makeNetwork();
  await one.startProcess();
  await captured(one);
  await annotated(one, 'enabled');
  await eventually(async () =>
    expect((await eventsOf(one)).map(({ type, reason }) => `${type} ${reason}`).sort()).toEqual([
      'Normal EbbtideEnrolled',
      'Warning EbbtideEnrolmentFailed',
    ]),
  );
});

it('stays as it is while the API server is away, and goes on when it is back', async () => {
  const one = await (await pod('one')).run();
  await annotated(one, 'enabled');
  await server.stopServer('SIGKILL');
  await new Promise((resolve) => setTimeout(resolve, 2000));
  expect(goesOut(one)).toBe(false);
  expect(await statusOf(one)).toMatchObject({ state: 'captured' });
  await server.startServer();
  const two = await (await pod('two')).run();
  await captured(two);
  await annotated(two, 'enabled');
  const metrics = await agent.get('/metrics');
  expect(metrics.text).toMatch(/ebbtide_agent_pods\{state="captured"\} 2/);
  expect(metrics.text).toMatch(/ebbtide_agent_enrolment_duration_seconds_count [1-9]/);
  expect(metrics.text).toMatch(/ebbtide_agent_proxies_connected 1/);
});

it('takes pods that come in a burst', async () => {
  const burst = await Promise.all(Array.from({ length: 40 }, (_, index) => pod(`burst-${index}`)));
  for (const each of burst) {
    each.makeNetwork();
    await each.startProcess();
  }
  const begun = performance.now();
  await Promise.all(burst.map((each) => each.reportRunning()));
  const reported = performance.now();
  await eventually(async () => {
    const { pods } = await readStatus(`${socket}.status`);
    expect(pods.filter(({ state, reason }) => state === 'captured' && reason === '')).toHaveLength(40);
  });
  const done = performance.now();
  await Promise.all(burst.map((each) => annotated(each, 'enabled')));
  const written = performance.now();
  process.stdout.write(
    `burst of 40: reported in ${Math.round(reported - begun)} ms, captured ${Math.round(done - reported)} ms later, ` +
      `annotated ${Math.round(written - done)} ms after that\n`,
  );
});
