/** Connections to a captured pod, the proxy's dials into it, its own calls to itself, and what may not reach the proxy. */

import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import { CaptureLab, type LabPod, OUTSIDE, type Peer } from './capture/lab.ts';

describe('a captured pod', () => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;
  let proxy: Peer;

  beforeAll(async () => {
    lab = new CaptureLab();
    capture = lab.open();
    pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.prepare(pod.pod);
    proxy = await lab.startProxy(capture, pod);
    capture.activate(pod.pod);
  });
  afterAll(async () => await lab?.remove());

  function listenerNames(): string[] {
    return (proxy.lines.find((line) => 'ready' in line) as { ready: string[] }).ready;
  }

  /** Long enough for what peers print to arrive here. */
  function settled(): Promise<void> {
    return new Promise((resolve) => setTimeout(resolve, 100));
  }

  async function dial(...words: (string | number)[]): Promise<unknown> {
    const from = proxy.lines.length;
    proxy.process.stdin?.write(`dial ${words.join(' ')}\n`);
    return (await proxy.next((line) => 'dial' in line, from)).dial;
  }

  for (const address of ['10.231.0.2', 'fd31::2']) {
    const shown = address.includes(':') ? `[${address}]` : address;

    it(`gets connections from outside steered to the plaintext listener: ${address}`, async () => {
      const server = await pod.serve(address, 8081);
      for (const port of ['8081', '9999']) {
        expect(lab.runOutside('connect', address, port)).toMatchObject({
          ok: true,
          answer: expect.stringMatching(/^proxy plaintext .*:\d+$/),
          peer: `${shown}:${port}`,
        });
      }
      await settled();
      expect(server.lines).toHaveLength(1);
      await server.stop();
    });

    it(`gets connections to 15008 steered to the HBONE listener: ${address}`, () => {
      expect(lab.runOutside('connect', address, '15008').answer).toMatch(/^proxy hbone .*:15008$/);
    });

    it(`reaches itself untouched: ${address}`, async () => {
      const server = await pod.serve(address, 8082);
      const result = pod.connect(address, 8082);
      expect(result).toMatchObject({ ok: true, peer: `${shown}:8082` });
      expect(result.answer).toBe(`app ${result.local}`);
      const bound = pod.connect(address, 8082, 'device=eth0');
      expect(bound.answer).toBe(`app ${bound.local}`);
      await server.stop();
    });

    it(`shows the application the client that the proxy speaks for: ${address}`, async () => {
      const server = await pod.serve('::', 8083);
      const client = address.includes(':') ? 'fd31::77' : '10.231.0.77';
      expect(await dial(client, 4321, address, 8083)).toMatchObject({ ok: true });
      const seen = await server.next((line) => 'accepted' in line);
      const expected = address.includes(':') ? `[${client}]:4321` : `[::ffff:${client}]:4321`;
      expect(seen).toMatchObject({ accepted: expected, getpeername: expected });
      await server.stop();
    });
  }

  it('shows the client also when that is the pod itself', async () => {
    const server = await pod.serve('10.231.0.2', 8084);
    expect(await dial('10.231.0.2', 4444, '10.231.0.2', 8084)).toMatchObject({ ok: true });
    expect(await server.next((line) => 'accepted' in line)).toMatchObject({ accepted: '10.231.0.2:4444' });
    await server.stop();
  });

  it('lets the proxy refuse: a dial to a closed port fails at once', async () => {
    expect(await dial('10.231.0.77', 4321, '10.231.0.2', 1)).toMatchObject({ ok: false, step: 'connect', errno: 111 });
  });

  it('does not let an application state a client', () => {
    // Without the proxy's trust the bind means what it says, and the address is not the pod's.
    expect(pod.connect('10.231.0.2', 8084, 'bind=10.231.0.77/4321')).toMatchObject({ ok: false, step: 'bind' });
  });

  it('has loopback to itself, 127.128/9 and the numbers of the mesh included', async () => {
    for (const [address, port] of [
      ['127.0.0.1', 8085],
      ['127.0.0.1', 15001],
      ['127.128.1.1', 8085],
      ['127.0.0.1', 15006],
      ['::1', 15008],
    ] as const) {
      const server = await pod.serve(address, port);
      const result = pod.connect(address, port);
      expect(result.answer).toBe(`app ${result.local}`);
      await server.stop();
    }
  });

  it('keeps being captured when its application listens on the numbers of the mesh', async () => {
    const servers = [];
    for (const port of [15001, 15006, 15008]) servers.push(await pod.serve('::', port));
    expect(pod.connect(OUTSIDE.ip4, 15001).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:15001`);
    expect(pod.connect(OUTSIDE.ip6, 80).answer).toBe(`proxy outbound [${OUTSIDE.ip6}]:80`);
    expect(lab.runOutside('connect', '10.231.0.2', '15006').answer).toMatch(/^proxy plaintext /);
    expect(pod.connect('10.231.0.2', 15008).answer).toMatch(/^app /);
    await settled();
    for (const server of servers) {
      expect(server.lines.filter((line) => 'accepted' in line).length).toBeLessThan(2);
      await server.stop();
    }
  });

  it("reaches none of the proxy's listeners by its port, from inside or outside", {
    timeout: patient(120_000),
  }, async () => {
    for (const name of listenerNames()) {
      const port = name.slice(name.lastIndexOf(':') + 1);
      await settled();
      const before = proxy.lines.length;
      for (const address of ['127.0.0.1', '127.128.1.1', '10.231.0.2']) {
        expect(pod.connect(address, Number(port), 'nonblock').ok).not.toBe(true);
      }
      expect(lab.runOutside('connect', '10.231.0.2', port, 'nonblock').ok).not.toBe(true);
      await settled();
      expect(proxy.lines.length).toBe(before);
    }
  });

  it('cannot take connections by joining a reuseport group: 0 of 60', async () => {
    const thieves = [];
    for (const name of listenerNames()) {
      const port = name.slice(name.lastIndexOf(':') + 1);
      thieves.push(pod.start('serve', '::', port, 'reuseport'));
      thieves.push(pod.start('serve', '127.0.0.1', port, 'reuseport'));
    }
    await new Promise((resolve) => setTimeout(resolve, 300));
    for (let i = 0; i < 60; i++) {
      const from = proxy.lines.length;
      expect(pod.connect(i % 2 ? OUTSIDE.ip4 : OUTSIDE.ip6, 7000 + i).answer).toMatch(/^proxy outbound /);
      await proxy.next((line) => 'accepted' in line, from);
    }
    await settled();
    for (const thief of thieves) {
      expect(thief.lines.some((line) => 'accepted' in line)).toBe(false);
      await thief.stop();
    }
  });

  it('spreads connections over the workers of the proxy', async () => {
    await settled();
    const used = new Set(
      proxy.lines.filter((line) => line.accepted === 'outbound').map((line) => line.listener as number),
    );
    expect(used.size).toBe(2);
  });

  it('is closed while the proxy is dead, and works when another comes', async () => {
    await proxy.stop();
    const server = await pod.serve('::', 8086);
    const outside = await lab.startOutside('serve', '0.0.0.0', '8086');
    expect(pod.connect(OUTSIDE.ip4, 8086)).toMatchObject({ ok: false, step: 'connect', errno: 1 });
    expect(pod.connect(OUTSIDE.ip6, 8086)).toMatchObject({ ok: false, step: 'connect', errno: 1 });
    expect(lab.runOutside('connect', '10.231.0.2', '8086', 'nonblock').ok).not.toBe(true);
    expect(pod.connect('10.231.0.2', 8086).answer).toMatch(/^app /);
    await settled();
    expect(server.lines.filter((line) => 'accepted' in line)).toHaveLength(1);
    expect(outside.lines).toHaveLength(1);
    proxy = await lab.startProxy(capture, pod);
    expect(pod.connect(OUTSIDE.ip4, 8086).answer).toMatch(/^proxy outbound /);
    expect(lab.runOutside('connect', '10.231.0.2', '8086').answer).toMatch(/^proxy plaintext /);
    await server.stop();
  });
});
