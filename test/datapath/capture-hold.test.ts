/**
 * New pods: held until they are decided about and captured, from the first instruction of their first process and from
 * the first packet to them, while an agent runs and while none does. What leaves is read off the wire.
 */

import { spawn } from 'node:child_process';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture, HeldPod, HoldOptions } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import {
  bpfObjects,
  CaptureLab,
  cgroupRoot,
  type Json,
  type LabPod,
  NODE,
  OUTSIDE,
  type Peer,
  run,
} from './capture/lab.ts';
import { Kubepods } from './capture/newcomers.ts';
import { Wire } from './capture/wire.ts';

const ADDON = new URL('../../native/build/Release/capture.node', import.meta.url).pathname;
const POD = ['10.231.0.2', 'fd31::2'] as const;
/** Until the agent has found the network namespace, in these tests. */
const LATE_MS = 400;
const EPERM = 1;
const ECONNREFUSED = 111;

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

describe('a new pod', () => {
  let lab: CaptureLab;
  let kubepods: Kubepods;
  let capture: Capture;
  let wire: Wire | undefined;
  /** When the last pod was known and served, and still held. */
  let activated = 0;

  beforeEach(() => {
    lab = new CaptureLab();
    lab.addNodeAddresses();
    kubepods = new Kubepods(lab);
  });
  afterEach(async () => {
    await wire?.stop();
    wire = undefined;
    await lab?.remove();
    kubepods?.remove();
  });

  function open(undecided: HoldOptions['undecided'] = 'refuse'): Capture {
    return lab.open('agent', { hold: { undecided, podCgroup: kubepods.directory } });
  }

  /** An agent of its own process, killed once it has begun. */
  async function openAndKill(): Promise<void> {
    const options = {
      cgroup: cgroupRoot(),
      pinDirectory: lab.pinDirectory('agent'),
      hold: { undecided: 'refuse', podCgroup: kubepods.directory },
    };
    const script = `const { Capture } = require(${JSON.stringify(ADDON)});
      globalThis.kept = new Capture(${JSON.stringify(options)});
      process.stdout.write('open');
      setInterval(() => {}, 1000);`;
    const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] });
    const gone = new Promise((resolve) => child.once('exit', resolve));
    await Promise.race([new Promise((resolve) => child.stdout.once('data', resolve)), gone]);
    expect(child.kill('SIGKILL')).toBe(true);
    await gone;
  }

  async function watch(): Promise<Wire> {
    wire = await Wire.open(`ebA-${process.pid}-out`);
    return wire;
  }

  /** What an agent does once it knows the network namespace. */
  async function enrol(pod: LabPod, uid: string, agent = capture): Promise<Peer> {
    const spec = { ...pod.pod, uid };
    agent.prepare(spec);
    const proxy = await lab.startProxy(agent, pod, 1);
    activated = Date.now();
    agent.activate(spec);
    return proxy;
  }

  function held(uid: string, agent = capture): HeldPod {
    const found = agent.held().find((each) => each.uid === uid);
    if (!found) throw new Error(`no pod ${uid} in ${JSON.stringify(agent.held())}`);
    return found;
  }

  /** Callers from the outside that begin before the pod exists. */
  async function hammer(): Promise<Peer[]> {
    return await Promise.all(POD.map((address) => lab.startOutside('hammer', address, '8080', `${patient(15_000)}`)));
  }

  async function answers(callers: readonly Peer[]): Promise<string[]> {
    return await Promise.all(
      callers.map(async (each) => String((await each.next((line) => 'answer' in line, 0, 20_000)).answer)),
    );
  }

  for (const driver of ['cgroupfs', 'systemd'] as const) {
    it(`of the mesh connects in its first instruction, and all of it goes to the proxy (${driver})`, {
      timeout: patient(60_000),
    }, async () => {
      const server = await lab.startOutside('serve', '::', '80');
      const seen = await watch();
      capture = open();
      const { uid } = { uid: '0b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b' };
      capture.decide(uid, 'mesh');
      const { cgroup } = kubepods.make(driver, uid);
      const pod = lab.addPod('a', ...POD);
      const began = Date.now();
      const ways = ['', 'nonblock', 'uring', 'mptcp', 'fastopen', 'deferred'];
      const clients = ways.flatMap((way) =>
        [OUTSIDE.ip4, OUTSIDE.ip6].map((address) => ({
          way,
          address,
          answer: kubepods
            .connect(cgroup, pod, address, '80', ...(way ? [way] : []))
            .then((result) => ({ result, ms: Date.now() - began })),
        })),
      );
      await expect.poll(() => held(uid).delayedConnects, { timeout: patient(10_000) }).toBe(clients.length);
      await sleep(LATE_MS);
      expect(held(uid)).toMatchObject({ held: true, verdict: 'mesh', refusedConnects: 0 });
      await enrol(pod, uid);
      const captured = Date.now() - began;
      const delays: number[] = [];
      for (const { way, address, answer } of clients) {
        const { result, ms } = await answer;
        const name = address.includes(':') ? `[${address}]` : address;
        expect([way, result]).toEqual([
          way,
          expect.objectContaining({ ok: true, answer: `proxy outbound ${name}:80` }),
        ]);
        delays.push(ms - captured);
      }
      await sleep(100);
      expect(seen.packets.filter(({ from }) => (POD as readonly string[]).includes(from))).toEqual([]);
      expect(server.lines).toHaveLength(1);
      const after = held(uid);
      expect(after).toMatchObject({ held: false, refusedConnects: 0, delayedConnects: ways.length * 2 });
      expect(after.heldMs).toBeGreaterThan(LATE_MS);
      expect(after.heldMs).toBeLessThan(captured + patient(500));
      console.log(
        `${driver}: held ${after.heldMs.toFixed(0)} ms; connects finished at most ${Math.max(...delays)} ms after the capture`,
      );
    });
  }

  for (const protocol of ['TCP', 'MPTCP'] as const) {
    it(`of the mesh is reached by nobody before it is captured, however they hammer (${protocol})`, {
      timeout: patient(60_000),
    }, async () => {
      const seen = await watch();
      capture = open();
      const callers = await hammer();
      await sleep(100);
      const { uid } = { uid: '1b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b' };
      capture.decide(uid, 'mesh');
      const { cgroup } = kubepods.make('cgroupfs', uid);
      const pod = lab.addPod('a', ...POD);
      const mptcp = protocol === 'MPTCP' ? ['env', 'MPTCP=1'] : [];
      const server = kubepods.start(cgroup, pod, ...mptcp, lab.peer, 'serve', '::', '8080');
      await server.next((line) => line.ready === true);
      // Callers ask once a second only who has the address.
      await expect.poll(() => held(uid).refusedInbound, { timeout: patient(10_000) }).toBeGreaterThan(20);
      await sleep(LATE_MS);
      const refused = held(uid).refusedInbound;
      expect(seen.clear(POD)).toEqual([]);
      const proxy = await enrol(pod, uid);
      expect((await answers(callers)).map((each) => each.split(' ')[1])).toEqual(['plaintext', 'plaintext']);
      expect(seen.clear(POD, activated)).toEqual([]);
      expect(server.lines).toHaveLength(1);
      // What waits for nobody: the proxy reaches the application.
      proxy.process.stdin?.write(`dial - 0 ${POD[0]} 8080\n`);
      expect((await proxy.next((line) => 'dial' in line)).dial).toMatchObject({ ok: true });
      expect(seen.packets.length).toBeGreaterThan(20);
      console.log(`${protocol}: ${refused} packets to it dropped`);
    });
  }

  it('about which nothing is decided is refused, and free at once when it turns out to be plain', async () => {
    await lab.startOutside('serve', '::', '80');
    const seen = await watch();
    capture = open();
    const { uid, cgroup } = kubepods.make();
    const pod = lab.addPod('a', ...POD);
    const server = kubepods.start(cgroup, pod, lab.peer, 'serve', '::', '8080');
    await server.next((line) => line.ready === true);
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6, `::ffff:${OUTSIDE.ip4}`])
      expect(await kubepods.connect(cgroup, pod, address, '80')).toEqual({ ok: false, step: 'connect', errno: EPERM });
    const callers = await hammer();
    await expect.poll(() => held(uid).refusedInbound, { timeout: patient(10_000) }).toBeGreaterThan(20);
    expect(seen.clear(POD)).toEqual([]);
    expect(held(uid)).toMatchObject({ held: true, verdict: 'none', refusedConnects: 3, delayedConnects: 0 });
    expect(Math.abs(held(uid).since.getTime() - Date.now())).toBeLessThan(20_000);
    capture.decide(uid, 'plain');
    expect((await answers(callers)).every((each) => each.startsWith('app '))).toBe(true);
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6])
      expect(await kubepods.connect(cgroup, pod, address, '80')).toMatchObject({ ok: true });
    const { heldMs } = held(uid);
    await sleep(50);
    expect(held(uid)).toMatchObject({ held: false, verdict: 'plain', refusedConnects: 3, heldMs });
    expect(capture.heldTotals()).toMatchObject({ pods: 1, unseen: 0, refusedConnects: 3 });
  });

  it('that appears while no agent runs is refused network until one is back', async () => {
    await lab.startOutside('serve', '::', '80');
    const seen = await watch();
    await openAndKill();
    const callers = await hammer();
    const { uid, cgroup } = kubepods.make();
    const pod = lab.addPod('a', ...POD);
    const server = kubepods.start(cgroup, pod, lab.peer, 'serve', '::', '8080');
    await server.next((line) => line.ready === true);
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6])
      expect(await kubepods.connect(cgroup, pod, address, '80')).toMatchObject({ ok: false, errno: EPERM });
    // The kernel's own count, while nobody asks.
    const sums = ['bpftool', '-j', 'map', 'dump', 'pinned', `${lab.pinDirectory('agent')}/v2/maps/ebb_held`];
    const dropped = (): number =>
      (JSON.parse(run(...sums)) as [{ formatted: { value: { refused_inbound: number } } }])[0].formatted.value
        .refused_inbound;
    await expect.poll(dropped, { timeout: patient(10_000) }).toBeGreaterThan(20);
    await sleep(LATE_MS);
    expect(seen.clear(POD)).toEqual([]);
    capture = open();
    expect(held(uid)).toMatchObject({ held: true, refusedConnects: 2 });
    expect(held(uid).refusedInbound).toBeGreaterThan(20);
    capture.decide(uid, 'mesh');
    const waiting = kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80');
    await sleep(100);
    await enrol(pod, uid);
    expect(await waiting).toMatchObject({ ok: true, answer: `proxy outbound ${OUTSIDE.ip4}:80` });
    expect((await answers(callers)).map((each) => each.split(' ')[1])).toEqual(['plaintext', 'plaintext']);
    expect(seen.clear(POD, activated)).toEqual([]);
    expect(server.lines).toHaveLength(1);
  });

  it('that was decided before the agent ended keeps its verdict', async () => {
    await lab.startOutside('serve', '::', '80');
    const first = open();
    const plain = '2b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b';
    first.decide(plain, 'plain');
    first.close({ remove: false });
    const pod = lab.addPod('a', ...POD);
    const { cgroup } = kubepods.make('systemd', plain);
    expect(await kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
    capture = open();
    expect(capture.decided()).toEqual([plain]);
    expect(held(plain)).toMatchObject({ held: false, heldMs: 0, refusedConnects: 0, delayedConnects: 0 });
    capture.forget(plain);
    expect(capture.decided()).toEqual([]);
    // Its cgroup is empty, so it is gone; one with a process in it is not.
    expect(capture.held()).toEqual([]);
    const other = kubepods.make();
    await kubepods.start(other.cgroup, pod, lab.peer, 'serve', '::', '8080').next((line) => line.ready === true);
    capture.decide(other.uid, 'plain');
    expect(held(other.uid)).toMatchObject({ held: false });
    capture.forget(other.uid);
    expect(held(other.uid)).toMatchObject({ held: true, verdict: 'none' });
    // Nobody knew of this one.
    const third = kubepods.make();
    capture.forget(third.uid);
    expect(held(third.uid)).toMatchObject({ held: true, verdict: 'none' });
  });

  it('that is plain is free from its first instruction', async () => {
    await lab.startOutside('serve', '::', '80');
    capture = open();
    const callers = await hammer();
    for (let round = 0; round < 5; round++) {
      const uid = `3b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6${round}`;
      capture.decide(uid, 'plain');
      const { cgroup } = kubepods.make('cgroupfs', uid);
      const pod = lab.addPod(`p${round}`, `10.231.0.${20 + round}`, `fd31::2${round}`);
      for (const address of [OUTSIDE.ip4, OUTSIDE.ip6])
        expect(await kubepods.connect(cgroup, pod, address, '80')).toMatchObject({ ok: true });
      expect(held(uid)).toMatchObject({ held: false, heldMs: 0, refusedConnects: 0, delayedConnects: 0 });
    }
    const uid = '4b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b';
    capture.decide(uid, 'plain');
    const { cgroup } = kubepods.make('cgroupfs', uid);
    kubepods.start(cgroup, lab.addPod('a', ...POD), lab.peer, 'serve', '::', '8080');
    expect((await answers(callers)).every((each) => each.startsWith('app '))).toBe(true);
    expect(held(uid)).toMatchObject({ refusedInbound: 0 });
  });

  it('may be let through by setting as long as nothing is decided', async () => {
    await lab.startOutside('serve', '::', '80');
    open('allow').close({ remove: false });
    const { uid, cgroup } = kubepods.make();
    const pod = lab.addPod('a', ...POD);
    const connect = (): Promise<Json> => kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80');
    expect(await connect()).toMatchObject({ ok: true });
    capture = open('allow');
    expect(held(uid)).toMatchObject({ held: false, heldMs: 0 });
    capture.close({ remove: false });
    capture = open('refuse');
    expect(await connect()).toMatchObject({ ok: false, errno: EPERM });
    capture.close({ remove: false });
    // Without holding, nothing of it is left.
    capture = lab.open();
    expect(await connect()).toMatchObject({ ok: true });
    expect(capture.held()).toEqual([]);
    kubepods.make();
    expect(capture.held()).toEqual([]);
  });

  it('in the network namespace of the node is never touched, nor is one that is older', async () => {
    await lab.startOutside('serve', '::', '80');
    const older = kubepods.make();
    capture = open();
    const pod = lab.addPod('a', ...POD);
    expect(await kubepods.connect(older.cgroup, pod, OUTSIDE.ip4, '80')).toMatchObject({ ok: true });
    const host = kubepods.make();
    const server = kubepods.start(host.cgroup, undefined, lab.peer, 'serve', '::', '18080');
    await server.next((line) => line.ready === true);
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6])
      expect(await kubepods.connect(host.cgroup, undefined, address, '80')).toMatchObject({ ok: true });
    for (const address of [NODE.ip4, NODE.ip6])
      expect(lab.runOutside('connect', address, '18080')).toMatchObject({ ok: true });
    expect(held(host.uid)).toMatchObject({ refusedConnects: 0, refusedInbound: 0 });
    expect(capture.held().map(({ uid }) => uid)).toEqual([host.uid]);
  });

  it('may talk to itself and by UDP while it is held', async () => {
    capture = open();
    const { cgroup } = kubepods.make();
    const pod = lab.addPod('a', ...POD);
    const server = kubepods.start(cgroup, pod, lab.peer, 'serve', '::', '8080');
    await server.next((line) => line.ready === true);
    for (const address of ['127.0.0.1', '::1', '0.0.0.0'])
      expect(await kubepods.connect(cgroup, pod, address, '8080')).toMatchObject({ ok: true });
    const argv = ['-i', 'eth0', '-nn', '-c', '1', '--immediate-mode', 'udp port 53'];
    const dump = spawn('nsenter', [`--net=/var/run/netns/ebA-${process.pid}-out`, 'tcpdump', ...argv], {
      timeout: patient(10_000),
    });
    await new Promise<void>((resolve) =>
      dump.stderr.on('data', (text: Buffer) => text.includes('listening') && resolve()),
    );
    const script = `echo $$ > ${cgroup}/container/cgroup.procs; echo x > /dev/udp/${OUTSIDE.ip4}/53`;
    const ended = new Promise((resolve) => dump.once('exit', resolve));
    run('nsenter', `--net=${pod.path}`, 'bash', '-c', script);
    expect(await ended).toBe(0);
  });

  it('whose connects wait is told at once when it turns out to be plain', async () => {
    const seen = await watch();
    capture = open();
    const { uid } = { uid: '5b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b' };
    capture.decide(uid, 'mesh');
    const { cgroup } = kubepods.make('cgroupfs', uid);
    const pod = lab.addPod('a', ...POD);
    const waiting = [OUTSIDE.ip4, OUTSIDE.ip6].map((address) => kubepods.connect(cgroup, pod, address, '80'));
    await expect.poll(() => held(uid).delayedConnects).toBe(2);
    capture.decide(uid, 'plain');
    for (const each of waiting) expect(await each).toEqual({ ok: false, step: 'connect', errno: ECONNREFUSED });
    expect(seen.clear(POD)).toEqual([]);
  });

  it('that runs joins and leaves without being held, and is held again in a namespace it gets later', async () => {
    await lab.startOutside('serve', '::', '80');
    const seen = await watch();
    capture = open();
    const { uid } = { uid: '6b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b' };
    capture.decide(uid, 'plain');
    const { cgroup } = kubepods.make('cgroupfs', uid);
    const pod = lab.addPod('b', '10.231.0.3', 'fd31::3');
    const connect = (): Promise<Json> => kubepods.connect(cgroup, pod, OUTSIDE.ip4, '80');
    const direct = { ok: true, answer: expect.stringMatching(/^app /) };
    expect(await connect()).toMatchObject(direct);
    capture.decide(uid, 'mesh');
    expect(await connect()).toMatchObject(direct);
    await enrol(pod, uid);
    expect(await connect()).toMatchObject({ ok: true, answer: `proxy outbound ${OUTSIDE.ip4}:80` });
    capture.release(uid);
    expect(await connect()).toMatchObject(direct);
    capture.activate({ ...pod.pod, uid });
    expect(await connect()).toMatchObject({ ok: true, answer: `proxy outbound ${OUTSIDE.ip4}:80` });
    // A new sandbox.
    const again = lab.addPod('a', ...POD);
    const waiting = kubepods.connect(cgroup, again, OUTSIDE.ip4, '80');
    await sleep(100);
    await enrol(again, uid);
    expect(await waiting).toMatchObject({ ok: true, answer: `proxy outbound ${OUTSIDE.ip4}:80` });
    expect(seen.clear(POD)).toEqual([]);
  });

  it('vanishes with its cgroup, of many pods in a burst too, and what is no pod is none', async () => {
    const before = bpfObjects();
    capture = open();
    const elsewhere = new Kubepods(lab);
    expect(elsewhere.directory).toBe(kubepods.directory);
    capture.close({ remove: true });
    kubepods = elsewhere;
    capture = open();
    const pods = Array.from({ length: 200 }, (_, i) => kubepods.make(i % 2 ? 'cgroupfs' : 'systemd'));
    expect(new Set(capture.held().map(({ uid }) => uid))).toEqual(new Set(pods.map(({ uid }) => uid)));
    expect(capture.held().every((each) => each.held && each.verdict === 'none')).toBe(true);
    const hash = 'f0123456789abcdef0123456789abcde';
    kubepods.make('cgroupfs', hash);
    kubepods.make('systemd', hash.replace('f', '0'));
    expect(capture.held().filter(({ uid }) => !uid.includes('-'))).toHaveLength(2);
    for (const name of [
      'podman',
      `pod${'x'.repeat(36)}`,
      `pod${'1'.repeat(37)}`,
      `x-pod${'1'.repeat(36)}.scope`,
      'x.slice',
    ])
      kubepods.other(name);
    expect(capture.held()).toHaveLength(202);
    run('mkdir', `${kubepods.directory}-other`);
    try {
      run('mkdir', `${kubepods.directory}-other/pod7b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b`);
      run('rmdir', `${kubepods.directory}-other/pod7b6f7a9e-4c1d-4e0f-9a3b-5d2c1e0f7a6b`);
    } finally {
      run('rmdir', `${kubepods.directory}-other`);
    }
    expect(capture.heldTotals()).toMatchObject({ pods: 202, unseen: 0 });
    kubepods.remove();
    await expect.poll(() => capture.held()).toEqual([]);
    capture.close({ remove: true });
    await expect.poll(bpfObjects, { timeout: patient(10_000) }).toEqual(before);
  });

  it('is decided about in words that exist', () => {
    capture = open();
    expect(() => capture.decide('', 'plain')).toThrow(/UID/);
    expect(() => capture.decide('x'.repeat(40), 'mesh')).toThrow(/UID/);
    expect(() => capture.decide('a', 'none' as 'mesh')).toThrow(TypeError);
    capture.close({ remove: true });
    expect(() => lab.open('agent', { hold: { undecided: 'never' as 'allow' } })).toThrow(TypeError);
    expect(() => lab.open('agent', { hold: { undecided: 'allow', podCgroup: '/proc/self' } })).toThrow(/cgroup2/);
    expect(() => lab.open('agent', { hold: { undecided: 'allow', podCgroup: '/nowhere' } })).toThrow(/\/nowhere/);
  });
});
