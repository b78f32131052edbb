/** Connections that are open, half open or just being opened when their pod is enrolled, under load. */

import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import { CaptureLab, type LabPod, OUTSIDE, Peer, run } from './capture/lab.ts';

const EACH = 300;

describe('enrolment under load', () => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;

  beforeEach(async () => {
    lab = new CaptureLab();
    capture = lab.open();
    pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.prepare(pod.pod);
    await lab.startProxy(capture, pod, 2);
  });
  afterEach(async () => await lab?.remove());

  function flows(): number {
    const maps = `${lab.pinDirectory('agent')}/v2/maps`;
    return Number(run('sh', '-c', `bpftool map dump pinned ${maps}/ebb_flows | grep -c '"kind":'; true`));
  }

  /** Both directions and both families, all connected. */
  async function openMany(): Promise<Peer[]> {
    const clients = [];
    await lab.startOutside('echo', '::', '8092');
    await pod.start('echo', '::', '8093').next((line) => line.ready === true);
    for (const address of [OUTSIDE.ip4, OUTSIDE.ip6]) {
      clients.push(pod.start('many', address, '8092', `${EACH}`));
    }
    for (const address of pod.pod.addresses) {
      clients.push(lab.keep(new Peer(lab.outside('many', address, '8093', `${EACH}`))));
    }
    for (const client of clients) await client.next((line) => line.connected === EACH);
    return clients;
  }

  it('breaks none of many connections that carry traffic, and lists them until they end', async () => {
    const clients = await openMany();
    for (const client of clients) client.process.stdin?.write('xxx');
    capture.activate(pod.pod);
    for (const client of clients) client.process.stdin?.write('xx');
    for (const client of clients) {
      await expect.poll(() => client.lines.length, { timeout: patient(20_000) }).toBe(6);
      expect(client.lines.slice(1)).toEqual(Array(5).fill({ echoed: EACH }));
    }
    expect(capture.status()[0]).toMatchObject({ inheritedConnections: 4 * EACH, guardDrops: 0n });
    for (const client of clients.slice(0, 2)) await client.stop();
    await expect.poll(() => capture.status()[0]?.inheritedConnections, { timeout: patient(10_000) }).toBe(2 * EACH);
    capture.activate(pod.pod);
    expect(capture.status()[0]?.inheritedConnections).toBe(2 * EACH);
    for (const client of clients) await client.stop();
    await expect.poll(() => capture.status()[0]?.inheritedConnections, { timeout: patient(10_000) }).toBe(0);
    expect(flows()).toBe(0);
  });

  it('breaks none that an agent after this one takes over', async () => {
    const clients = await openMany();
    capture.activate(pod.pod);
    capture.close({ remove: false });
    capture = lab.open();
    capture.activate(pod.pod);
    for (const client of clients) client.process.stdin?.write('x');
    for (const client of clients) await client.next((line) => line.echoed === EACH, 0, 20_000);
    expect(capture.status()[0]?.inheritedConnections).toBe(4 * EACH);
    for (const client of clients) await client.stop();
    await expect.poll(() => capture.status()[0]?.inheritedConnections, { timeout: patient(10_000) }).toBe(0);
    expect(flows()).toBe(0);
  });

  it('breaks none that is being opened at that moment, whichever way it takes', async () => {
    await lab.startOutside('echo', '::', '8092');
    for (let round = 0; round < 6; round++) {
      const clients = [OUTSIDE.ip4, OUTSIDE.ip6].flatMap((address) =>
        [0, 1].map(() => pod.start('many', address, '8092', '400')),
      );
      await new Promise((resolve) => setTimeout(resolve, 5 * round));
      capture.activate(pod.pod);
      for (const client of clients) await client.next((line) => line.connected === 400, 0, 20_000);
      for (const client of clients) client.process.stdin?.write('x');
      for (const client of clients) await client.next((line) => line.echoed === 400, 0, 20_000);
      for (const client of clients) await client.stop();
      capture.release(pod.pod.uid);
      capture.prepare(pod.pod);
    }
    await expect.poll(flows, { timeout: patient(10_000) }).toBe(0);
  });

  it('bounds what a pod has listed that opened more than there is room for, and guards it', {
    timeout: patient(120_000),
  }, async () => {
    const other = lab.addPod('b', '10.231.0.3', 'fd31::3');
    capture.prepare(other.pod);
    await lab.startProxy(capture, other, 1);
    run('ip', '-n', pod.netns, 'route', 'add', 'default', 'via', OUTSIDE.ip4);
    const flood = pod.start('flood', '10.40.0.1', '40000');
    expect(await flood.next((line) => 'begun' in line, 0, 40_000)).toMatchObject({ begun: 40_000 });
    capture.activate(pod.pod);
    expect(capture.status().find(({ uid }) => uid === pod.pod.uid)).toMatchObject({
      outbound: true,
      guard: 'attached',
      inheritedConnections: 16384,
    });
    capture.activate(other.pod);
    expect(other.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
    await flood.stop();
    capture.release(pod.pod.uid);
    await expect.poll(flows, { timeout: patient(10_000) }).toBe(0);
  });

  it('lets a connection be finished whose SYN is out, but none be begun again', async () => {
    const inPod = (...argv: string[]) => run('nsenter', `--net=${pod.path}`, ...argv);
    const link = run('ip', '-n', pod.netns.replace(/-a$/, '-out'), '-br', 'link', 'show', 'eth0');
    const handmade = async () => {
      const sniffer = await lab.startOutside('sniff', '4242', '700');
      pod.run('raw', 'bypass', '10.231.0.2', OUTSIDE.ip4, '4242', 'eth0', link.split(/\s+/)[2] as string);
      return (await sniffer.next((line) => 'seen' in line)).seen;
    };
    const server = await lab.startOutside('serve', '0.0.0.0', '4242');
    const client = pod.start('connect', OUTSIDE.ip4, '4242', 'bind=10.231.0.2/40001', 'hold');
    await client.next((line) => 'connected' in line);
    capture.activate(pod.pod);
    client.process.stdin?.write('payload\n');
    await server.next((line) => line.got === 'payload');
    expect(await handmade()).toBe(0);
    await client.stop();
    capture.release(pod.pod.uid);
    inPod(
      'nft',
      'add table inet x; add chain inet x i { type filter hook input priority 0; }; add rule inet x i tcp sport 4242 drop',
    );
    const late = pod.start('connect', OUTSIDE.ip4, '4242', 'hold');
    await new Promise((resolve) => setTimeout(resolve, 200));
    capture.prepare(pod.pod);
    capture.activate(pod.pod);
    inPod('nft', 'delete table inet x');
    await late.next((line) => 'connected' in line);
    late.process.stdin?.write('payload\n');
    await expect
      .poll(() => server.lines.filter((line) => line.got === 'payload').length, { timeout: patient(8000) })
      .toBe(2);
  });
});
