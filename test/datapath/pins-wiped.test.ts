/** Somebody empties the bpffs, unmounts it or detaches programs: while an agent runs, and while none does. */
import { readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { patient } from '../../src/lab/wait.ts';
import { type AgentProcess, BootNode } from './capture/boot-guard.ts';
import { bpfObjects, CaptureLab, type LabPod, OUTSIDE, run } from './capture/lab.ts';
import { Kubepods } from './capture/newcomers.ts';

const EPERM = 1;

let lab: CaptureLab;
let kubepods: Kubepods;
let node: BootNode;
let pod: LabPod;
let uid: string;
let cgroup: string;
let before: ReturnType<typeof bpfObjects>;

const eventually = (check: () => unknown): Promise<unknown> =>
  vi.waitFor(check, { timeout: patient(20_000), interval: 20 });
/** Whether a connection of the pod gets out in clear: no proxy is here, so a captured one is refused. */
const goesOut = (): boolean => pod.connect(OUTSIDE.ip4, 8080).ok === true;
const pins = (): string[] =>
  readdirSync(node.pins, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort();
const wipe = (): string => run('find', node.pins, '-depth', '-delete');

/** Name of the pin of a guard that is no link. */
const isClassic = (pin: string): boolean => pin.includes('guardtc-');

const uninstall = (): string => run(...node.uninstallCommand());

async function captured(agent: AgentProcess): Promise<AgentProcess> {
  await eventually(() => expect(agent.said('started')).toBe(true));
  await eventually(async () => {
    const [status] = (await readStatus(`${node.socket}.status`)).pods;
    expect(status).toMatchObject({ uid, state: 'captured', capture: { outbound: true, inbound: true } });
  });
  return agent;
}

/** Tries all the time; resolves with how often the pod got out when the check succeeds. */
async function gapsUntil(check: () => boolean): Promise<number> {
  let gaps = 0;
  const deadline = Date.now() + patient(20_000);
  while (!check()) {
    if (Date.now() > deadline) throw new Error('it took more than 20 s');
    if (goesOut()) gaps++;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  return gaps;
}

/** A pod of nobody that comes now is held. */
async function holdsNewPods(): Promise<void> {
  const fresh = kubepods.make();
  expect(await kubepods.connect(fresh.cgroup, pod2(), OUTSIDE.ip4, '8080')).toMatchObject({ ok: false, errno: EPERM });
}
let second: LabPod | undefined;
function pod2(): LabPod {
  second ??= lab.addPod('b', '10.231.0.3', 'fd31::3');
  return second;
}

beforeEach(async () => {
  before = bpfObjects();
  second = undefined;
  lab = new CaptureLab();
  kubepods = new Kubepods(lab);
  node = new BootNode(lab, kubepods);
  run('mount', '-t', 'bpf', 'bpf', node.bpffs);
  pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
  ({ uid, cgroup } = kubepods.make());
  node.declare('a', uid, pod);
  await lab.startOutside('serve', OUTSIDE.ip4, '8080');
});
afterEach(async () => {
  await node?.remove();
  await lab?.remove();
  kubepods?.remove();
});

for (const [how, take] of [
  ['its pins are removed', wipe],
  ['the bpffs is unmounted', () => run('umount', '-l', node.bpffs)],
] as const) {
  it(`while an agent runs ${how}: nothing is let go, the pins are made again, and the next agent adopts them`, async () => {
    const agent = await captured(node.agent('--port', '0'));
    const there = pins();
    expect(there.length).toBeGreaterThan(30);
    take();
    const began = Date.now();
    expect(await gapsUntil(() => agent.said('pins_restored'))).toBe(0);
    console.log(`restored ${there.length} pins after ${Date.now() - began} ms, 0 connections in clear`);
    expect(pins()).toEqual(there);
    const port = /"event":"http_listening","port":(\d+)/.exec(agent.output)?.[1];
    const metrics = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
    expect(metrics).toContain(`ebbtide_agent_pins_restored_total ${there.length}\n`);
    await holdsNewPods();
    await agent.kill();
    expect(goesOut()).toBe(false);
    const next = node.agent();
    expect(await gapsUntil(() => next.said('started'))).toBe(0);
    expect(next.said('pod_adopted')).toBe(true);
    expect(next.said('pins_lost')).toBe(false);
    await holdsNewPods();
  });
}

it('an agent holds what it pinned for a pod as long as that is captured, and no longer', async () => {
  const agent = await captured(node.agent());
  const descriptors = (): number => readdirSync(`/proc/${agent.process.pid}/fd`).length;
  await new Promise((resolve) => setTimeout(resolve, 500));
  const withPod = descriptors();
  const own = readdirSync(join(node.pins, 'v2', 'pods', uid)).length;
  expect(own).toBeGreaterThan(1);
  for (let round = 0; round < 3; round++) {
    rmSync(join(node.manifests, 'a.yaml'));
    await eventually(() => expect(goesOut()).toBe(true));
    // And that of the network namespace.
    await eventually(() => expect(descriptors()).toBe(withPod - own - 1));
    node.declare('a', uid, pod);
    await captured(agent);
    // The questions for the status have descriptors, too, for a moment.
    await eventually(() => expect(descriptors()).toBe(withPod));
  }
});

describe.each(['auto', 'clsact'])('with guard %s', (guard) => {
  it('while an agent runs programs are detached: it attaches them again', async () => {
    const agent = await captured(node.agent('--guard', guard));
    const own = readdirSync(join(node.pins, 'v2', 'pods', uid)).map((name) => `pods/${uid}/${name}`);
    const detach = (link: string): string => run('bpftool', 'link', 'detach', 'pinned', join(node.pins, 'v2', link));
    detach('links/ebb_connect4');
    // The guard on the veth lets out what the proxy published, and nothing else.
    expect(goesOut()).toBe(false);
    await eventually(() => expect(agent.said('programs_reattached')).toBe(true));
    detach('links/ebb_connect4');
    for (const each of own)
      isClassic(each) ? run('tc', 'filter', 'del', 'dev', lab.hostSide('a'), 'ingress') : detach(each);
    expect(goesOut()).toBe(true);
    const status = (await readStatus(`${node.socket}.status`)).pods[0];
    expect(status?.capture).toMatchObject({ outbound: false, inbound: false });
    await eventually(() => expect(agent.said('pod_detached')).toBe(true));
    await captured(agent);
    expect(goesOut()).toBe(false);
  });

  it('while no agent runs everything is gone with the pins: the next agent says so and captures again', async () => {
    await (await captured(node.agent('--guard', guard))).kill();
    expect(goesOut()).toBe(false);
    const classic = readdirSync(join(node.pins, 'v2', 'pods', uid)).some(isClassic);
    wipe();
    // Nobody is left who could hold anything but, before Linux 6.6, the guard: a filter goes with its interface alone.
    if (classic) expect(goesOut()).toBe(false);
    else await eventually(() => expect(goesOut()).toBe(true));
    const next = await captured(node.agent());
    expect(next.said('pins_lost')).toBe(true);
    expect(goesOut()).toBe(false);
    await holdsNewPods();
  });
});

it('between the boot guard and the agent: the agent says that the guard was lost, and captures', async () => {
  expect(node.guard().code).toBe(0);
  const late = kubepods.make();
  expect(await kubepods.connect(late.cgroup, pod, OUTSIDE.ip4, '8080')).toMatchObject({ ok: false, errno: EPERM });
  wipe();
  await eventually(async () =>
    expect(await kubepods.connect(late.cgroup, pod, OUTSIDE.ip4, '8080')).toMatchObject({ ok: true }),
  );
  const agent = await captured(node.agent());
  expect(agent.said('boot_guard_lost')).toBe(true);
  expect(cgroup).toContain(uid);
});

it('guards that outlive pins and agent, being filters, end with the next agent for pods that it does not capture, or by uninstall', async () => {
  const { uid: otherUid } = kubepods.make();
  const other = pod2();
  node.declare('b', otherUid, other);
  const first = node.agent('--guard', 'clsact');
  await eventually(async () => {
    const { pods } = await readStatus(`${node.socket}.status`);
    expect(pods.map(({ state }) => state)).toEqual(['captured', 'captured']);
  });
  await first.kill();
  wipe();
  rmSync(join(node.manifests, 'b.yaml'));
  const otherGoesOut = (): boolean => other.connect(OUTSIDE.ip4, 8080).ok === true;
  expect(otherGoesOut()).toBe(false);
  const next = await captured(node.agent('--guard', 'clsact'));
  await eventually(() => expect(next.said('stray_guards_removed')).toBe(true));
  expect(otherGoesOut()).toBe(true);
  expect(goesOut()).toBe(false);
  await next.kill();
  wipe();
  expect(goesOut()).toBe(false);
  expect(uninstall()).toContain('removed 1 guards whose pins were gone');
  expect(goesOut()).toBe(true);
});

it('uninstall does nothing while an agent runs, and leaves nothing once it has ended', async () => {
  const agent = await captured(node.agent());
  expect(uninstall).toThrow(/an agent is running.*stop it first/);
  expect(goesOut()).toBe(false);
  await agent.kill();
  expect(uninstall()).toMatch(/removed \d+ pins/);
  expect(goesOut()).toBe(true);
  await eventually(() => {
    const own = Object.entries(bpfObjects()).map(([kind, ids]) => [
      kind,
      ids.filter((id) => !before[kind]?.includes(id)),
    ]);
    expect(own).toEqual([
      ['prog', []],
      ['link', []],
      ['map', []],
    ]);
  });
});
