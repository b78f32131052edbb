/** What root inside a captured pod can try: filling what all pods share, and leaving past the proxy. */

import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
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

  /** Flows of all pods: as the programs count them, and as there are. */
  function flows(): { counted: number; present: number } {
    const maps = `${lab.pinDirectory('agent')}/v1/maps`;
    const all = run('bpftool', '-j', 'map', 'lookup', 'pinned', `${maps}/ebb_stats`, 'key', ...Array(8).fill('0'));
    const counted = (JSON.parse(all) as { formatted: { value: { flows: number } } }).formatted.value.flows;
    const script = `bpftool map dump pinned ${maps}/ebb_flows | grep -c '"kind":'; true`;
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

  it('cannot fill the flows that other pods need, with half-open connections', async () => {
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
    await expect.poll(flows, { timeout: 20_000, interval: 500 }).toEqual({ counted: 0, present: 0 });
    inPod('nft', 'delete table inet x');
    expect(pod.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
  }, 120_000);

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

  it('does not reach a listener of its own by a capture address', async () => {
    const server = await pod.serve('0.0.0.0', 15001);
    expect(pod.connect('127.0.0.1', 15001).answer).toMatch(/^app /);
    expect(pod.connect('127.128.1.1', 15001, 'nonblock').ok).not.toBe(true);
    await server.stop();
  });
});
