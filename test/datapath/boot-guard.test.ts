/**
 * Between a boot and the agent: the boot guard first, then pods, then agents that come, come late, crash or never come. A boot
 * is a node's bpffs that is empty; what leaves the pods is read off the wire.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { openCapture } from '../../src/agent/native-capture.ts';
import { readStatus } from '../../src/agent/status.ts';
import { patient } from '../../src/lab/wait.ts';
import { BootNode } from './capture/boot-guard.ts';
import { bpfObjects, CaptureLab, cgroupRoot, type LabPod, OUTSIDE, type Peer, run } from './capture/lab.ts';
import { Kubepods } from './capture/newcomers.ts';
import { Wire } from './capture/wire.ts';

const POD = ['10.231.0.2', 'fd31::2'] as const;
const EPERM = 1;
const GUARDED = 0;
const NOT_GUARDED = 1;
const OTHER_VERSION = 3;

let lab: CaptureLab;
let kubepods: Kubepods;
let node: BootNode;
let wire: Wire | undefined;
let before: ReturnType<typeof bpfObjects>;
const captures: Capture[] = [];

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
const eventually = (check: () => unknown): Promise<unknown> =>
  vi.waitFor(check, { timeout: patient(20_000), interval: 20 });

/** What is loaded and attached, which does not change when nothing is done. */
function ownObjects(): Record<string, number[]> {
  return Object.fromEntries(
    Object.entries(bpfObjects()).map(([kind, ids]) => [kind, ids.filter((id) => !before[kind]?.includes(id))]),
  );
}

/** The node's agent, in this process. */
function open(): Capture {
  const hold = { undecided: 'refuse', podCgroup: kubepods.directory } as const;
  const capture = openCapture({ cgroup: cgroupRoot(), pinDirectory: node.pins, hold });
  captures.push(capture);
  return capture;
}

async function watch(): Promise<Wire> {
  wire = await Wire.open(`ebA-${process.pid}-out`);
  return wire;
}

/** A pod that serves at once, and callers that hammer its address from before it exists. */
async function startPod(): Promise<{ uid: string; cgroup: string; pod: LabPod; callers: Peer[] }> {
  const callers = await Promise.all(POD.map((address) => lab.startOutside('hammer', address, '8080', '20000')));
  const { uid, cgroup } = kubepods.make();
  const pod = lab.addPod('a', ...POD);
  const server = kubepods.start(cgroup, pod, lab.peer, 'serve', '::', '8080');
  await server.next((line) => line.ready === true);
  return { uid, cgroup, pod, callers };
}

beforeEach(() => {
  before = bpfObjects();
  lab = new CaptureLab();
  lab.addNodeAddresses();
  kubepods = new Kubepods(lab);
  node = new BootNode(lab, kubepods);
});
afterEach(async () => {
  await wire?.stop();
  wire = undefined;
  for (const capture of captures.splice(0)) capture.close({ remove: true });
  await node?.remove();
  await lab?.remove();
  kubepods?.remove();
});

describe('a boot guard', () => {
  it('lets nothing out of or into pods that start before the agent, which then captures them by itself', async () => {
    await lab.startOutside('serve', '::', '80');
    const seen = await watch();
    const { code, said } = node.guard();
    expect([code, said]).toEqual([GUARDED, expect.stringMatching(/^guarded: .*no TCP until an agent has decided/)]);
    expect(JSON.parse(readFileSync(node.report, 'utf8'))).toMatchObject({ state: 'guarded' });
    const { uid, cgroup, pod, callers } = await startPod();
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6]) {
      const refused = { ok: false, step: 'connect', errno: EPERM };
      expect(await kubepods.connect(cgroup, pod, address, '80')).toEqual(refused);
    }
    // A process that began before the agent and goes on to try.
    await sleep(1000);
    expect(seen.packets.length).toBeGreaterThan(0);
    expect(seen.clear(POD)).toEqual([]);

    const capture = open();
    expect(capture.origin()).toBe('boot guard');
    const [held] = capture.held();
    expect(held).toMatchObject({ uid, held: true, verdict: 'none', refusedConnects: 2 });
    expect(held?.refusedInbound).toBeGreaterThan(20);
    capture.decide(uid, 'mesh');
    const waiting = kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80');
    await sleep(100);
    capture.prepare({ ...pod.pod, uid });
    await lab.startProxy(capture, pod, 1);
    const activated = Date.now();
    capture.activate({ ...pod.pod, uid });
    expect(await waiting).toMatchObject({ ok: true, answer: `proxy outbound ${OUTSIDE.ip4}:80` });
    for (const caller of callers) {
      const { answer } = await caller.next((line) => 'answer' in line, 0, patient(20_000));
      expect(answer).toMatch(/^proxy plaintext /);
    }
    expect(seen.clear(POD, activated)).toEqual([]);
    console.log(
      `held ${held?.heldMs.toFixed(0)} ms; ${held?.refusedInbound} packets to the pod dropped, 0 seen in clear`,
    );
    // The agent that comes next finds an agent's pins.
    capture.close({ remove: false });
    captures.pop();
    const next = open();
    expect(next.origin()).toBe('agent');
    expect(next.adopted().map((each) => each.uid)).toEqual([uid]);
    next.close({ remove: true });
    captures.pop();
    expect(existsSync(node.pins)).toBe(false);
    await eventually(() => expect(ownObjects()).toEqual({ prog: [], link: [], map: [] }));
  });

  it('frees a pod at once that the agent decides to be plain', async () => {
    await lab.startOutside('serve', '::', '80');
    node.guard();
    const { uid, cgroup, pod, callers } = await startPod();
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
    open().decide(uid, 'plain');
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
    for (const caller of callers) {
      expect((await caller.next((line) => 'answer' in line, 0, patient(20_000))).answer).toMatch(/^app /);
    }
  });

  it('leaves pods of before it and those in the network of the node alone', async () => {
    const older = await startPod();
    await lab.startOutside('serve', '::', '80');
    node.guard();
    expect(await kubepods.connect(older.cgroup, older.pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
    const host = kubepods.make();
    expect(await kubepods.connect(host.cgroup, undefined, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
  });

  it('changes nothing where an agent is, was, or the guard itself was before', async () => {
    const capture = open();
    const withAgent = ownObjects();
    const beside = node.guard();
    expect([beside.code, beside.said]).toEqual([GUARDED, expect.stringContaining('nothing was changed')]);
    expect(ownObjects()).toEqual(withAgent);
    capture.close({ remove: false });
    captures.pop();
    const after = node.guard();
    expect([after.code, after.said]).toEqual([GUARDED, expect.stringContaining('nothing was changed')]);
    expect(ownObjects()).toEqual(withAgent);
    expect(JSON.parse(readFileSync(node.report, 'utf8'))).toMatchObject({ state: 'agent' });
    // Nor is there anything that it would give away.
    expect(node.guard('release').said).toMatch(/nothing to release/);
    expect(ownObjects()).toEqual(withAgent);
  });

  it('finishes what one before it could only begin', async () => {
    expect(node.guard().code).toBe(GUARDED);
    const links = join(node.pins, 'v2', 'links');
    for (const name of ['ebb_mkdir', 'ebb_connect4', 'ebb_hold_in']) run('rm', join(links, name));
    expect(node.guard().code).toBe(GUARDED);
    expect(readdirSync(links)).toEqual(expect.arrayContaining(['ebb_mkdir', 'ebb_connect4', 'ebb_hold_in']));
    const { cgroup, pod } = await startPod();
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
    expect(open().origin()).toBe('boot guard');
  });

  it('that fails says so and leaves nothing behind', async () => {
    const wrong = node.guard('guard', '--cgroup', '/proc/self');
    expect([wrong.code, wrong.said]).toEqual([NOT_GUARDED, expect.stringMatching(/^failed: .*not guarded/)]);
    expect(JSON.parse(readFileSync(node.report, 'utf8'))).toMatchObject({ state: 'failed' });
    expect(node.guard('guard', '--pod-cgroup', '/nowhere').code).toBe(NOT_GUARDED);
    expect(existsSync(node.pins)).toBe(false);
    await eventually(() => expect(ownObjects()).toEqual({ prog: [], link: [], map: [] }));
    expect(node.guard('guard', '--node', 'Not A Node', '--timeout', '5').code).toBe(2);
    expect(node.guard('guard', '--timeout', '0').code).toBe(2);
  });

  it('of another version is taken over with the pods it holds; pins of another version’s agent are not touched', async () => {
    await lab.startOutside('serve', '::', '80');
    const seen = await watch();
    node.guard();
    const { uid, cgroup, pod } = await startPod();
    renameSync(join(node.pins, 'v2'), join(node.pins, 'v1'));
    const stop = Date.now() + patient(1500);
    const tries = (async () => {
      const errors: unknown[] = [];
      while (Date.now() < stop) errors.push((await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).errno);
      return errors;
    })();
    await sleep(300);
    const capture = open();
    expect(readdirSync(node.pins)).toEqual(['v2']);
    expect(capture.held().map((each) => each.uid)).toEqual([uid]);
    expect([...new Set(await tries)]).toEqual([EPERM]);
    expect(capture.held()[0]?.refusedInbound).toBeGreaterThan(20);
    expect(seen.clear(POD)).toEqual([]);
    capture.close({ remove: false });
    captures.pop();
    renameSync(join(node.pins, 'v2'), join(node.pins, 'v1'));
    expect(node.guard().code).toBe(OTHER_VERSION);
    expect(readdirSync(node.pins)).toEqual(['v1']);
    expect(() => open()).toThrow(/another version \(v1\)/);
  });
});

describe('agents after a boot guard', () => {
  it(
    'that are killed again and again let nothing out of pods that start meanwhile, and the last captures them',
    async () => {
      await lab.startOutside('serve', '::', '80');
      const seen = await watch();
      expect(node.guard().code).toBe(GUARDED);
      const addresses = [POD, ['10.231.0.3', 'fd31::3'], ['10.231.0.4', 'fd31::4']] as const;
      const pods: { uid: string; cgroup: string; pod: LabPod; name: string }[] = [];
      let lives = 0;
      let started = 0;
      for (const [i, own] of addresses.entries()) {
        const { uid, cgroup } = kubepods.make(i % 2 === 0 ? 'cgroupfs' : 'systemd');
        const name = `p${i}`;
        const pod = lab.addPod(name, own[0], own[1]);
        pods.push({ uid, cgroup, pod, name });
        await kubepods.start(cgroup, pod, lab.peer, 'serve', '::', '8080').next((line) => line.ready === true);
        node.declare(name, uid, pod);
        // Killed wherever it may be: before it has the node, while it takes over, with pods captured.
        for (const ms of [150, 300, 450, 'started'] as const) {
          const agent = node.agent();
          const until = Date.now() + patient(ms === 'started' ? 20_000 : ms + i * 60);
          while (Date.now() < until && !(ms === 'started' && agent.said('started'))) {
            for (const each of pods) {
              expect((await kubepods.connect(each.cgroup, each.pod, OUTSIDE.ip4, '80')).ok).toBe(false);
            }
          }
          await agent.kill();
          if (agent.said('started')) started++;
          lives++;
        }
      }
      expect(started).toBeGreaterThanOrEqual(addresses.length);
      const last = node.agent();
      await eventually(() => expect(last.said('started')).toBe(true));
      await eventually(async () => {
        const status = await readStatus(`${node.socket}.status`);
        expect(status.pods.map(({ uid, state }) => [uid, state])).toEqual(pods.map(({ uid }) => [uid, 'captured']));
      });
      for (const { cgroup, pod } of pods) {
        expect((await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).ok).toBe(false);
      }
      expect(seen.clear(addresses.flat())).toEqual([]);
      console.log(
        `${lives} agents killed, ${started} of them once they had the node; ${pods.length} pods captured by the last, 0 packets in clear`,
      );
    },
    patient(120_000),
  );

  it('with manifests decide about pods by the UID of their cgroup, and tell that a guard was there', async () => {
    node.guard();
    const { uid, cgroup, pod } = await startPod();
    const plain = kubepods.make();
    const other = lab.addPod('b', '10.231.0.3', 'fd31::3');
    await lab.startOutside('serve', '::', '80');
    node.declare('a', uid, pod);
    const agent = node.agent();
    await eventually(() => expect(agent.said('boot_guard_adopted')).toBe(true));
    await eventually(async () => {
      const [status] = (await readStatus(`${node.socket}.status`)).pods;
      expect(status).toMatchObject({ uid, state: 'captured', held: { uid, verdict: 'mesh', held: false } });
    });
    // In no manifest: undecided, so refused.
    expect(await kubepods.connect(plain.cgroup, other, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
    // No proxy is there.
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false });
  });

  it('tell what a pod carried before it was captured: with a guard none of it TCP, without one all of it and what is still open', async () => {
    const carried = async (guarded: boolean, name: string, address: readonly [string, string]) => {
      if (guarded) expect(node.guard().code).toBe(GUARDED);
      const { uid, cgroup } = kubepods.make();
      const pod = lab.addPod(name, address[0], address[1]);
      await lab.startOutside('serve', OUTSIDE.ip4, guarded ? '81' : '80');
      // 200 kB, and a connection that stays open.
      const script =
        'exec 3<>/dev/tcp/$0/$1 || exit 1; head -c 200000 /dev/zero >&3; echo "{\\"sent\\":true}"; sleep 60';
      const talker = kubepods.start(cgroup, pod, 'bash', '-c', script, OUTSIDE.ip4, guarded ? '81' : '80');
      if (guarded) await new Promise((resolve) => talker.process.once('exit', resolve));
      else await talker.next((line) => line.sent === true);
      node.declare(name, uid, pod);
      const agent = node.agent();
      await eventually(() => expect(agent.said('pod_captured')).toBe(true));
      const line = agent.output.split('\n').find((each) => each.includes('"event":"pod_captured"')) ?? '{}';
      await agent.kill();
      return (JSON.parse(line) as { before: { sentBytes: number; inheritedConnections: number } }).before;
    };
    const clear = await carried(false, 'late', POD);
    expect(clear.sentBytes).toBeGreaterThan(200_000);
    expect(clear.inheritedConnections).toBe(1);
    run(process.execPath, 'dist/main.js', 'uninstall', '--bpffs', node.bpffs, '--host-root', lab.directory);
    const held = await carried(true, 'held', ['10.231.0.3', 'fd31::3']);
    // Neighbour discovery.
    expect(held.sentBytes).toBeLessThan(2000);
    expect(held.inheritedConnections).toBe(0);
    console.log(`sent before capture: without a guard ${clear.sentBytes} bytes, with it ${held.sentBytes} (no TCP)`);
  });

  it('that cannot start leave the guard as it is', async () => {
    node.guard();
    const { cgroup, pod } = await startPod();
    // Where its socket should be is something that is none.
    mkdirSync(node.socket);
    const agent = node.agent();
    expect(await agent.exit).toBe(1);
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
  });
});

describe('an agent that is to keep the guard on its node', () => {
  it('installs it, finds it installed after a restart, and takes it away where it lets all pods go', async () => {
    const root = join(lab.directory, 'root');
    mkdirSync(join(root, 'etc/systemd/system'), { recursive: true });
    const unit = join(root, 'etc/systemd/system/ebbtide-boot-guard.service');
    const first = node.agent('--boot-guard', root);
    await eventually(() => expect(first.said('boot_guard_installed')).toBe(true));
    const text = readFileSync(unit, 'utf8');
    // What the unit would run does here what it is to do after a boot.
    await first.kill();
    run(process.execPath, 'dist/main.js', 'uninstall', '--bpffs', node.bpffs, '--host-root', lab.directory);
    const argv = /^ExecStart=(.*)$/m.exec(text)?.[1]?.split(' ') ?? [];
    run(join(root, argv[0] ?? ''), ...argv.slice(1), '--pod-cgroup', kubepods.directory);
    const second = node.agent('--boot-guard', root, '--no-keep');
    await eventually(() => expect(second.said('boot_guard_installed')).toBe(true));
    expect(second.said('boot_guard_adopted')).toBe(true);
    expect(readFileSync(unit, 'utf8')).toBe(text);
    second.process.kill('SIGTERM');
    expect(await second.exit).toBe(0);
    expect(run('find', root, '-type', 'f', '-o', '-type', 'l')).toBe('');
  });

  it('goes on where that is not possible, and says why', async () => {
    const agent = node.agent('--boot-guard', lab.directory);
    await eventually(() => expect(agent.said('boot_guard_not_installed')).toBe(true));
    expect(agent.said('started')).toBe(true);
    const open = node.agent('--boot-guard', lab.directory, '--hold', 'allow');
    expect(await open.exit).toBe(1);
    expect(open.output).toContain('give --hold refuse');
  });
});

describe('a node whose agent does not come', () => {
  const logs = (): string => join(lab.directory, 'pod-logs');
  const flags = (): string[] => [
    '--release-after',
    '2',
    '--pod-logs',
    logs(),
    '--daemonset',
    'ebbtide-system/ebbtide-node',
  ];

  beforeEach(() => {
    mkdirSync(logs());
    node.guard();
  });

  it('is freed when the kubelet starts other pods and none of the DaemonSet, and not guarded at the next boot', async () => {
    await lab.startOutside('serve', '::', '80');
    const link = join(lab.directory, 'enabled');
    symlinkSync('/nowhere', link);
    const { cgroup, pod } = await startPod();
    // Of the time before the boot.
    mkdirSync(join(logs(), 'ebbtide-system_ebbtide-node-abcde_9b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b'));
    const began = Date.now();
    const ended = node.wait(...flags(), '--disable', link);
    await sleep(1000);
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
    expect(await ended).toMatchObject({ code: 0, said: expect.stringMatching(/^released: .*none of DaemonSet/) });
    expect(Date.now() - began).toBeGreaterThan(1900);
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
    expect(existsSync(node.pins)).toBe(false);
    expect(readdirSync(lab.directory)).not.toContain('enabled');
    expect(JSON.parse(readFileSync(node.report, 'utf8'))).toMatchObject({ state: 'released' });
    await eventually(() => expect(ownObjects()).toEqual({ prog: [], link: [], map: [] }));
  });

  it('is not freed while a pod of the DaemonSet is being started, nor by static pods alone, nor by what cannot be read', async () => {
    kubepods.make('cgroupfs', 'f0123456789abcdef0123456789abcde');
    let over = false;
    const ended = node.wait(...flags()).then((ran) => {
      over = true;
      return ran;
    });
    await sleep(3500);
    expect(over).toBe(false);
    const agent = kubepods.make();
    mkdirSync(join(logs(), `ebbtide-system_ebbtide-node-abcde_${agent.uid}`));
    const { cgroup, pod } = await startPod();
    await sleep(3500);
    expect(over).toBe(false);
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: false, errno: EPERM });
    renameSync(logs(), `${logs()}-away`);
    writeFileSync(logs(), '');
    await sleep(2500);
    expect(over).toBe(false);
    // Its agent comes after all.
    open();
    expect(await ended).toMatchObject({ code: 0, said: expect.stringMatching(/over: .*an agent has taken over/) });
  });

  it('is freed by hand', async () => {
    await lab.startOutside('serve', '::', '80');
    const { cgroup, pod } = await startPod();
    expect(node.guard('release')).toMatchObject({ code: 0, said: expect.stringMatching(/^released: /) });
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
  });
});
