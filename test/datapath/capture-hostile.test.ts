/** What root inside a captured pod can try: filling what all pods share, and leaving past the proxy. */

import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import { CaptureLab, type LabPod, OUTSIDE, Peer, run } from './capture/lab.ts';

describe('root in a captured pod', () => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;
  let proxy: Peer;

  beforeEach(async () => {
    lab = new CaptureLab();
    capture = lab.open();
    pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.prepare(pod.pod);
    proxy = await lab.startProxy(capture, pod, 1);
    capture.activate(pod.pod);
  });
  afterEach(async () => await lab?.remove());

  /** Flows of all pods but inherited ones: as the programs count them, and as there are. */
  function flows(): { counted: number; present: number } {
    const maps = `${lab.pinDirectory('agent')}/v2/maps`;
    const all = run('bpftool', '-j', 'map', 'lookup', 'pinned', `${maps}/ebb_stats`, 'key', ...Array(8).fill('0'));
    const counted = (JSON.parse(all) as { formatted: { value: { flows: number } } }).formatted.value.flows;
    const script = `bpftool map dump pinned ${maps}/ebb_flows | grep '"kind":' | grep -vc '"kind": 4'; true`;
    return { counted, present: Number(run('sh', '-c', script)) };
  }

  function inPod(...argv: string[]): string {
    return run('nsenter', `--net=${pod.path}`, ...argv);
  }

  /** SYNs of a pod from port 40001 to the outside's port 4242 that arrive there. */
  async function handmade(from = pod): Promise<number> {
    const link = run('ip', '-n', pod.netns.replace(/-a$/, '-out'), '-br', 'link', 'show', 'eth0');
    const sniffer = await lab.startOutside('sniff', '4242', '700');
    from.run(
      'raw',
      'bypass',
      from.pod.addresses[0] as string,
      OUTSIDE.ip4,
      '4242',
      'eth0',
      link.split(/\s+/)[2] as string,
    );
    return (await sniffer.next((line) => 'seen' in line)).seen as number;
  }

  it('cannot fill the flows that other pods need, with half-open connections', {
    timeout: patient(120_000),
  }, async () => {
    const other = lab.addPod('b', '10.231.0.3', 'fd31::3');
    capture.prepare(other.pod);
    await lab.startProxy(capture, other, 1);
    capture.activate(other.pod);
    inPod(
      'nft',
      'add table inet x; add chain inet x i { type filter hook input priority 0; }; add rule inet x i tcp flags syn iif lo drop',
    );
    const flood = pod.start('flood', '10.40.0.1', '140000');
    const result = await flood.next((line) => 'begun' in line, 0, 40_000);
    expect(result).toEqual({ begun: expect.any(Number), refused: expect.any(Number), failed: 0 });
    expect(result.begun).toBeGreaterThan(20_000);
    expect(result.begun).toBeLessThan(50_000);
    const { counted, present } = flows();
    expect(counted).toBe(present);
    expect(other.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
    expect(other.connect(OUTSIDE.ip6, 80).answer).toBe(`proxy outbound [${OUTSIDE.ip6}]:80`);
    expect(lab.runOutside('connect', '10.231.0.3', '80').answer).toMatch(/^proxy plaintext /);
    expect(pod.connect(OUTSIDE.ip4, 80)).toMatchObject({ ok: false, step: 'connect', errno: 1 });
    await flood.stop();
    await expect.poll(flows, { timeout: patient(20_000), interval: 500 }).toEqual({ counted: 0, present: 0 });
    inPod('nft', 'delete table inet x');
    expect(pod.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
  });

  it('cannot have a tuple published by calling itself in the name of another host', async () => {
    // A host of the pod's own making, inside the pod, with the outside's address.
    const fake = lab.addNamespace('fake', '10.231.9.9', 'fd31:9::9');
    inPod('ip', 'link', 'add', 'veth9', 'type', 'veth', 'peer', 'name', 'eth9', 'netns', `/var/run/netns/${fake}`);
    for (const [netns, device, own, remote] of [
      [pod.netns, 'veth9', '', OUTSIDE.ip4],
      [fake, 'eth9', OUTSIDE.ip4, '10.231.0.2'],
    ] as const) {
      run('ip', '-n', netns, 'link', 'set', device, 'up');
      if (own) run('ip', '-n', netns, 'address', 'add', `${own}/32`, 'dev', device);
      run('ip', '-n', netns, 'route', 'add', `${remote}/32`, 'dev', device);
    }
    expect(await handmade()).toBe(0);
    const from = proxy.lines.length;
    const caller = lab.keep(
      new Peer([
        'nsenter',
        `--net=/var/run/netns/${fake}`,
        lab.peer,
        'connect',
        '10.231.0.2',
        '40001',
        `bind=${OUTSIDE.ip4}/4242`,
        'hold',
      ]),
    );
    await caller.next((line) => 'connected' in line);
    expect(await proxy.next((line) => 'accepted' in line, from)).toMatchObject({ accepted: 'plaintext' });
    inPod('ip', 'route', 'del', `${OUTSIDE.ip4}/32`, 'dev', 'veth9');
    expect(await handmade()).toBe(0);
  });

  it('is guarded also where another program was at the veth first and accepts all', async (context) => {
    const later = lab.addPod('b', '10.231.0.3', 'fd31::3');
    const device = run('ip', '-br', 'link', 'show', 'master', lab.bridge).match(/^ebA\d+b(?=@)/m)?.[0] as string;
    const other = lab.keep(new Peer([lab.peer, 'tcx', device]));
    const started = await other.next((line) => 'ready' in line || 'step' in line);
    if (started.errno === 22) context.skip('no tcx on this kernel');
    expect(started).toEqual({ ready: true });
    capture.activate(later.pod);
    expect(await handmade(later)).toBe(0);
    capture.release(later.pod.uid);
    expect(await handmade(later)).toBe(3);
  });

  it('is counted right under load, also when released and taken again meanwhile', async () => {
    const maps = `${lab.pinDirectory('agent')}/v2/maps`;
    const held = () => run('sh', '-c', `bpftool map dump pinned ${maps}/ebb_stats | grep -o '"flows": [0-9]*'; true`);
    const load = () => [
      ...[OUTSIDE.ip4, OUTSIDE.ip6].map((address) => pod.start('many', address, '80', '200')),
      ...pod.pod.addresses.map((address) => lab.keep(new Peer(lab.outside('many', address, '80', '200')))),
    ];
    for (let round = 0; round < 3; round++) {
      const clients = load();
      for (const client of clients) await client.next((line) => line.connected === 200, 0, 20_000);
      // The stand-in ends connections by and by, so the two are not read at one moment.
      await expect
        .poll(() => ((now) => now.present > 0 && now.counted - now.present)(flows()), { timeout: patient(10_000) })
        .toBe(0);
      if (round === 1) {
        capture.release(pod.pod.uid);
        capture.activate(pod.pod);
      }
      for (const client of clients) await client.stop();
    }
    await proxy.stop();
    await expect.poll(flows, { timeout: patient(20_000), interval: 500 }).toEqual({ counted: 0, present: 0 });
    expect(held().trim().split('\n')).toEqual(['"flows": 0', '"flows": 0']);
  });

  it('does not leave by a namespace of its own that it gives its interface', async () => {
    const nested = lab.addNamespace('nest', '10.231.9.8', 'fd31:9::8');
    run('ip', '-n', pod.netns, 'link', 'set', 'eth0', 'netns', nested, 'name', 'eth5');
    run('ip', '-n', nested, 'link', 'delete', 'eth0');
    run('ip', '-n', nested, 'address', 'add', '10.231.0.2/24', 'dev', 'eth5');
    run('ip', '-n', nested, 'link', 'set', 'eth5', 'up');
    const server = await lab.startOutside('serve', '0.0.0.0', '8088');
    const argv = ['nsenter', `--net=/var/run/netns/${nested}`, lab.peer, 'connect', OUTSIDE.ip4, '8088'];
    const client = lab.keep(new Peer(argv));
    expect((await client.next((line) => 'ok' in line)).ok).toBe(false);
    expect(server.lines).toHaveLength(1);
    expect(capture.status()[0]?.guardDrops).toBeGreaterThan(0n);
  });

  it('does not reach a listener of its own by a capture address', async () => {
    const server = await pod.serve('0.0.0.0', 13312);
    expect(pod.connect('127.0.0.1', 13312).answer).toMatch(/^app /);
    expect(pod.connect('127.128.1.1', 13312, 'nonblock').ok).not.toBe(true);
    await server.stop();
  });
});
