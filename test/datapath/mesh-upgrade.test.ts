/** An upgrade: the next agent and the next proxy beside the old ones, which then end, while connections are made and held. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type Lab, type LabProcess, type MeshNode, type Pod, sleep, waitFor } from '../../src/lab/index.ts';
import { captured, labWith } from '../lib/mesh-lab.ts';
import { Background, PORT, startServer } from '../lib/peers.ts';

/** The proxy's own rule makes 9 s of it. */
const GRACE_SECONDS = 10;
/** Loads in each direction at once. */
const LOADS = 2;

async function upgradeLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  const near = await lab.pod({ name: 'near', namespace: 'meshed', node: 1 });
  const far = await lab.pod({ name: 'far', namespace: 'meshed', node: 2 });
  const outside = await lab.pod({ name: 'outside', namespace: 'plain', node: 2 });
  lab.namespace('plain', { mesh: false });
  for (const pod of [near, far]) await startServer(pod);
  await lab.startMesh({ proxyEnv: { TERMINATION_GRACE_PERIOD_SECONDS: String(GRACE_SECONDS) } });
  await captured(lab, near, far);
  await captured(lab, far, near);
  return { near, far, outside };
}

let made: { near: Pod; far: Pod; outside: Pod; lab: Lab };
beforeAll(async () => {
  made = await labWith(upgradeLab);
});
afterAll(() => made?.lab.close());

const logged = (process: LabProcess | undefined, event: string) =>
  waitFor(
    `${process?.name} to log ${event}`,
    () => process !== undefined && readFileSync(process.log, 'utf8').includes(`"event":"${event}"`),
    { hint: () => process?.tail() ?? '' },
  );

async function startLoads(seconds: number): Promise<Background[]> {
  const { near, far, outside } = made;
  const pairs: [Pod, Pod][] = [
    [near, far],
    [far, near],
    [outside, near],
  ];
  const loads = pairs.flatMap(([from, to]) =>
    Array.from({ length: LOADS }, () => Background.start(from, 'load', to.addresses.v4, PORT.echo, seconds)),
  );
  return Promise.all(loads);
}

/** @returns what became of the loads, the long-lived connections told apart */
async function outcome(loads: readonly Background[]) {
  const results = await Promise.all(loads.map((load) => load.result()));
  const failures: Record<string, number> = {};
  for (const result of results) {
    for (const [reason, count] of Object.entries(result.failures as Record<string, number>)) {
      if (!reason.startsWith('long: ')) failures[reason] = (failures[reason] ?? 0) + count;
    }
  }
  return {
    connections: results.reduce((sum, { done }) => sum + Number(done), 0),
    failures,
    slowestMs: Math.max(...results.map(({ slowest_ms: ms }) => Number(ms))),
    longLived: results.length,
    longLivedCut: results.filter(({ long_lived: lives }) => lives !== true).length,
  };
}

/** The next proxy, and once it is ready the end of the one before. */
async function upgradeProxy(node: MeshNode, ports: number): Promise<{ readonly tookMs: number }> {
  const old = node.proxy;
  await node.startProxy(ports);
  await node.ready();
  const begun = performance.now();
  old?.signal('SIGTERM');
  await old?.ended();
  expect(old?.exitCode).toBe(0);
  return { tookMs: Math.round(performance.now() - begun) };
}

it('a next proxy that lacks the state of the mesh gets no connection, and none fails because of it', async () => {
  const { lab, near } = made;
  const node = lab.node(1);
  const old = node.proxy;
  const listeners = async () =>
    (await near.run(['ss', '-Hltn'])).stdout.split('\n').filter((line) => /:150/.test(line)).length;
  const before = await listeners();
  const loads = await startLoads(8);
  // Nobody answers there.
  await node.startProxy(20_000, { XDS_ADDRESS: 'https://127.0.0.1:9' });
  await logged(node.agent, 'zds_standby');
  const result = await outcome(loads);
  expect(result.failures).toEqual({});
  expect(result.longLivedCut).toBe(0);
  expect(await listeners()).toBe(before);
  await node.proxy?.stop('SIGKILL');
  node.proxy = old;
  await node.startProxy(30_000);
  await node.ready();
  expect(await listeners()).toBe(before * 2);
  await node.proxy?.stop('SIGTERM');
  node.useProxy(old, 0);
  await captured(lab, near, made.far);
}, 60_000);

it('upgrade of each node’s agent and proxy under load: no new connection fails; long-lived ones last as long as is granted', async () => {
  const { lab } = made;
  const loads = await startLoads(50);
  await sleep(1000);
  const took: number[] = [];
  for (const number of [1, 2] as const) {
    const node = lab.node(number);
    const oldAgent = node.agent;
    await oldAgent?.stop('SIGKILL');
    await node.startAgent('--take-over', '--keep');
    await logged(node.agent, 'started');
    const firstAgent = node.agent;
    await node.startAgent('--take-over', '--keep');
    await logged(node.agent, 'handed_over');
    took.push((await upgradeProxy(node, 10_000)).tookMs);
    firstAgent?.signal('SIGTERM');
    await firstAgent?.ended();
    expect(firstAgent?.exitCode).toBe(0);
  }
  const result = await outcome(loads);
  process.stdout.write(`upgrade of both nodes: ${JSON.stringify({ ...result, drainedMs: took })}\n`);
  expect(result.failures).toEqual({});
  expect(result.connections).toBeGreaterThan(500);
  // Each of them passes one of the upgraded proxies and outlives what is granted: cut, once, at its end.
  expect(result.longLivedCut).toBe(result.longLived);
  // The first proxy waited for them as long as it may; the second had none left, and ended when its last one had.
  expect(took[0]).toBeGreaterThan((GRACE_SECONDS - 1.5) * 1000);
  expect(took[1]).toBeLessThan((GRACE_SECONDS - 3) * 1000);
  await captured(lab, made.near, made.far);
}, 120_000);
