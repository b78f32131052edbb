/** Connects of a captured pod, in all the ways applications make them, end at the proxy with their destination. */

import { existsSync, readFileSync, rmdirSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { CaptureLab, type LabPod, makeCgroup, OUTSIDE, type Peer } from './capture/lab.ts';

describe('a captured pod connecting', () => {
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

  /** The way ends at the proxy with the destination, and the application sees the names it would see without a mesh. */
  async function captured(address: string, ...options: string[]): Promise<void> {
    const from = proxy.lines.length;
    const shown = address.startsWith('::ffff:') ? `[${address}]` : address.includes(':') ? `[${address}]` : address;
    const plain = address.startsWith('::ffff:') ? address.slice(7) : shown;
    const own = address.startsWith('::ffff:')
      ? '[::ffff:10.231.0.2]'
      : address.includes(':')
        ? '[fd31::2]'
        : '10.231.0.2';
    const result = pod.connect(address, 8080, ...options);
    expect(result).toMatchObject({ ok: true, answer: `proxy outbound ${plain}:8080`, peer: `${shown}:8080` });
    const local = result.local as string;
    expect(local.slice(0, local.lastIndexOf(':'))).toBe(own);
    const seen = await proxy.next((line) => line.accepted === 'outbound', from);
    expect(seen.original).toBe(`${plain}:8080`);
    const own4 = own.replace('[::ffff:10.231.0.2]', '10.231.0.2');
    const port = local.slice(local.lastIndexOf(':') + 1);
    expect([`${own4}:${port}`, `[::ffff:${own4}]:${port}`]).toContain(seen.peer);
  }

  it('has its listeners on ports of the kernel, found by role', () => {
    const ready = proxy.lines[0]?.ready as string[];
    expect(ready).toHaveLength(6);
    expect(new Set(ready).size).toBe(6);
    for (const name of ready) expect(name).not.toMatch(/:1500[168]$/);
    expect(capture.status()).toMatchObject([
      {
        uid: 'uid-a',
        outbound: true,
        inbound: true,
        guard: 'attached',
        listeners: { outbound: 2, hbone: 2, plaintext: 2 },
      },
    ]);
  });

  it('is captured by IPv4', () => captured(OUTSIDE.ip4));
  it('is captured by IPv6', () => captured(OUTSIDE.ip6));
  it('is captured by a mapped address', () => captured(`::ffff:${OUTSIDE.ip4}`));
  it('is captured with IPV6_V6ONLY', () => captured(OUTSIDE.ip6, 'v6only'));
  it('is captured without blocking', () => captured(OUTSIDE.ip4, 'nonblock'));
  it('is captured without blocking, IPv6', () => captured(OUTSIDE.ip6, 'nonblock'));
  it('is captured when bound before', () => captured(OUTSIDE.ip4, 'bind=10.231.0.2/5555'));
  it('is captured when bound before, IPv6', () => captured(OUTSIDE.ip6, 'bind=fd31::2/5556'));
  it('is captured with SO_MARK', () => captured(OUTSIDE.ip4, 'mark=1337'));
  it('is captured with SO_BINDTODEVICE', () => captured(OUTSIDE.ip4, 'device=eth0'));
  it('is captured with SO_BINDTODEVICE, IPv6', () => captured(OUTSIDE.ip6, 'device=eth0'));
  it('is captured as another user', () => captured(OUTSIDE.ip4, 'setuid=65534'));
  it('is captured with MPTCP', () => captured(OUTSIDE.ip4, 'mptcp'));
  it('is captured with MPTCP, IPv6', () => captured(OUTSIDE.ip6, 'mptcp'));
  it('is captured with MSG_FASTOPEN', () => captured(OUTSIDE.ip4, 'fastopen'));
  it('is captured with MSG_FASTOPEN, IPv6', () => captured(OUTSIDE.ip6, 'fastopen'));
  it('is captured with TCP_FASTOPEN_CONNECT', () => captured(OUTSIDE.ip4, 'deferred'));

  it('is captured by io_uring', async (context) => {
    // Linux before 6.6 has no such setting.
    const setting = '/proc/sys/kernel/io_uring_disabled';
    if (existsSync(setting) && readFileSync(setting, 'utf8').trim() === '2')
      context.skip('io_uring is disabled on this machine');
    await captured(OUTSIDE.ip4, 'uring');
  });

  it('is captured from a cgroup of its own', async () => {
    const cgroup = makeCgroup(`ebA-own-${process.pid}`);
    try {
      await captured(OUTSIDE.ip4, `cgroup=${cgroup}/cgroup.procs`);
    } finally {
      rmdirSync(cgroup);
    }
  });

  it('is captured after a disconnect from loopback, and the other way round', async () => {
    const server = await pod.serve('0.0.0.0', 7001);
    await captured(OUTSIDE.ip4, 'again=7001');
    await server.stop();
  });

  it('counts what it captured', () => {
    const [status] = capture.status();
    expect(status?.capturedConnections).toBeGreaterThan(10n);
    expect(status?.lastCaptureNs).toBeGreaterThan(0n);
  });

  it('is captured each of many times', async () => {
    for (let i = 0; i < 60; i++) {
      const from = proxy.lines.length;
      const result = pod.connect(i % 2 ? OUTSIDE.ip4 : OUTSIDE.ip6, 9000 + i);
      expect(result.answer).toMatch(`:${9000 + i}`);
      await proxy.next((line) => line.accepted === 'outbound', from);
    }
  });
});
