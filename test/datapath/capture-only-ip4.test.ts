/** A pod in whose network namespace IPv6 is disabled: the proxy's listeners are AF_INET. */

import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import { CaptureLab, type LabPod, OUTSIDE, type Peer, run } from './capture/lab.ts';

describe('a captured pod without IPv6', () => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;
  let proxy: Peer;

  beforeAll(async () => {
    lab = new CaptureLab();
    capture = lab.open();
    pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    for (const where of ['all', 'default', 'lo', 'eth0']) {
      run('nsenter', `--net=${pod.path}`, 'sysctl', '-qw', `net.ipv6.conf.${where}.disable_ipv6=1`);
    }
    const spec = { ...pod.pod, addresses: ['10.231.0.2'] };
    capture.prepare(spec);
    proxy = await lab.startProxy(capture, pod, 2, '0.0.0.0');
    capture.activate(spec);
  });
  afterAll(async () => await lab?.remove());

  function listenerNames(): string[] {
    return (proxy.lines.find((line) => 'ready' in line) as { ready: string[] }).ready;
  }

  it('has listeners of AF_INET on ports of the kernel', () => {
    const ready = listenerNames();
    expect(ready).toHaveLength(6);
    for (const name of ready) expect(name).toMatch(/^0\.0\.0\.0:(?!1500[168]$)\d+$/);
    expect(capture.status()).toMatchObject([{ listeners: { outbound: 2, hbone: 2, plaintext: 2 }, guard: 'attached' }]);
  });

  for (const options of [[], ['nonblock'], ['fastopen'], ['mptcp'], ['device=eth0']]) {
    it(`is captured ${options.join(' ')}`, async () => {
      for (const address of [OUTSIDE.ip4, `::ffff:${OUTSIDE.ip4}`]) {
        if (address.includes(':') && options[0] === 'mptcp') continue;
        const from = proxy.lines.length;
        const shown = address.includes(':') ? `[${address}]` : address;
        const result = pod.connect(address, 8080, ...options);
        expect(result).toMatchObject({
          ok: true,
          answer: `proxy outbound ${OUTSIDE.ip4}:8080`,
          peer: `${shown}:8080`,
          local: expect.stringMatching(/10\.231\.0\.2\]?:\d+$/),
        });
        const seen = await proxy.next((line) => line.accepted === 'outbound', from);
        expect(seen).toMatchObject({ original: `${OUTSIDE.ip4}:8080`, peer: expect.stringMatching(/^10\.231\.0\.2:/) });
      }
    });
  }

  it('fails to connect by IPv6 as it did before, and reaches nobody', () => {
    const from = proxy.lines.length;
    expect(pod.connect(OUTSIDE.ip6, 8080)).toMatchObject({ ok: false, step: 'connect' });
    expect(proxy.lines.length).toBe(from);
  });

  it('gets inbound connections steered, and its own untouched', async () => {
    expect(lab.runOutside('connect', '10.231.0.2', '9999').answer).toMatch(/^proxy plaintext 10\.231\.0\.2:9999/);
    expect(lab.runOutside('connect', '10.231.0.2', '15008').answer).toMatch(/^proxy hbone /);
    const server = await pod.serve('0.0.0.0', 8082);
    expect(pod.connect('10.231.0.2', 8082).answer).toMatch(/^app 10\.231\.0\.2:/);
    await server.stop();
  });

  it('shows the application the client that the proxy speaks for', async () => {
    for (const listen of ['0.0.0.0', '10.231.0.2', '::']) {
      const server = await pod.serve(listen, 8083);
      proxy.process.stdin?.write('dial 10.231.0.77 4321 10.231.0.2 8083\n');
      const expected = listen === '::' ? '[::ffff:10.231.0.77]:4321' : '10.231.0.77:4321';
      expect(await server.next((line) => 'accepted' in line)).toMatchObject({
        accepted: expected,
        getpeername: expected,
      });
      await server.stop();
    }
  });

  it("reaches none of the proxy's listeners by its port", { timeout: patient(120_000) }, () => {
    for (const name of listenerNames()) {
      const port = Number(name.slice(name.lastIndexOf(':') + 1));
      for (const address of ['127.0.0.1', '127.128.1.1', '10.231.0.2']) {
        expect(pod.connect(address, port, 'nonblock').ok).not.toBe(true);
      }
      expect(lab.runOutside('connect', '10.231.0.2', `${port}`, 'nonblock').ok).not.toBe(true);
    }
  });
});
