/** The guard on the host side of the veth: packets that no captured or published socket made do not leave the pod. */

import { readdirSync, renameSync, unlinkSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import { CaptureLab, type LabPod, OUTSIDE, type Peer, run } from './capture/lab.ts';

for (const classicGuard of [false, true]) {
  describe(`the guard by ${classicGuard ? 'clsact' : 'tcx'}`, () => {
    let lab: CaptureLab;
    let capture: Capture;
    let pod: LabPod;
    let proxy: Peer;

    beforeEach(async () => {
      lab = new CaptureLab();
      capture = lab.open('agent', { classicGuard });
      pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
      capture.prepare(pod.pod);
      proxy = await lab.startProxy(capture, pod, 1);
    });
    afterEach(async () => await lab?.remove());

    function mac(): string {
      return run('ip', '-n', pod.netns.replace(/-a$/, '-out'), '-br', 'link', 'show', 'eth0').split(/\s+/)[2] as string;
    }

    /** @param expected ends the wait where that many came */
    async function seen(method: string, expected: number): Promise<number> {
      const window = `${700 + patient(50)}`;
      const sniffer = await lab.startOutside('sniff', '4242', window, ...(expected > 0 ? [`${expected}`] : []));
      const result = pod.run('raw', method, '10.231.0.2', OUTSIDE.ip4, '4242', 'eth0', mac());
      expect(result.sent).toBe(3);
      return (await sniffer.next((line) => 'seen' in line)).seen as number;
    }

    it('stops hand-made connections of every kind, which left before', { timeout: patient(30_000) }, async () => {
      for (const method of ['tcp', 'header', 'packet', 'bypass']) expect(await seen(method, 3)).toBe(3);
      capture.activate(pod.pod);
      expect(capture.status()[0]?.guard).toBe('attached');
      for (const method of ['tcp', 'header', 'packet', 'bypass']) expect(await seen(method, 0)).toBe(0);
      expect(capture.status()[0]?.guardDrops).toBe(12n);
      capture.release(pod.pod.uid);
      expect(await seen('bypass', 3)).toBe(3);
    });

    it('lets the proxy dial out, and answer what was steered to it', async () => {
      capture.activate(pod.pod);
      const server = await lab.startOutside('serve', '::', '8090');
      for (const address of [OUTSIDE.ip4, OUTSIDE.ip6]) {
        const from = proxy.lines.length;
        proxy.process.stdin?.write(`dial - 0 ${address} 8090\n`);
        const { dial } = await proxy.next((line) => 'dial' in line, from);
        expect(dial).toMatchObject({ ok: true, answer: expect.stringMatching(/^app /) });
      }
      expect(lab.runOutside('connect', 'fd31::2', '80').answer).toMatch(/^proxy plaintext /);
      await expect.poll(() => server.lines.length).toBe(3);
      expect(capture.status()[0]?.guardDrops).toBe(0n);
    });

    it('lets connections live that were open before, and counts them until they end', async () => {
      const server = await lab.startOutside('serve', '0.0.0.0', '8091');
      const client = pod.start('connect', OUTSIDE.ip4, '8091', 'hold');
      await client.next((line) => 'connected' in line);
      capture.activate(pod.pod);
      expect(capture.status()[0]?.inheritedConnections).toBe(1);
      client.process.stdin?.write('payload\n');
      await server.next((line) => line.got === 'payload');
      await client.stop();
      await expect.poll(() => capture.status()[0]?.inheritedConnections).toBe(0);
    });
  });
}

describe('the guard by clsact whose agent was killed between two steps', () => {
  let lab: CaptureLab;
  let pod: LabPod;

  beforeEach(() => {
    lab = new CaptureLab();
    pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
  });
  afterEach(async () => await lab?.remove());

  const open = (): Capture => lab.open('agent', { classicGuard: true });
  const filters = (): string => lab.guardFilters('a');
  const pins = (): string => `${lab.pinDirectory('agent')}/v2/pods/${pod.pod.uid}`;
  const guardPin = (): string => join(pins(), readdirSync(pins()).find((name) => name.startsWith('guardtc-')) ?? '');

  function killedAgent(): void {
    const capture = open();
    capture.prepare(pod.pod);
    capture.activate(pod.pod);
    capture.close({ remove: false });
    expect(filters()).toContain('ebb_guard');
  }

  it('ends with its pod where its pin is that of the program before', () => {
    killedAgent();
    const [pin, before] = [guardPin(), join(pins(), 'before')];
    run('bpftool', 'prog', 'pin', 'pinned', pin, before);
    const next = open();
    renameSync(before, pin);
    next.release(pod.pod.uid);
    expect(filters()).toBe('');
  });

  it('is taken away where it has no pin, once the pods that are wanted have theirs', () => {
    killedAgent();
    unlinkSync(guardPin());
    const wanted = open();
    wanted.activate(pod.pod);
    expect(wanted.removeStrays()).toBe(0);
    expect(filters()).toContain('ebb_guard');
    unlinkSync(guardPin());
    wanted.close({ remove: false });
    const unwanted = open();
    unwanted.release(pod.pod.uid);
    expect(filters()).toContain('ebb_guard');
    expect(unwanted.removeStrays()).toBe(1);
    expect(filters()).toBe('');
  });
});
