/** A pod that is let go: its new connections are its own at once, and the proxy ends properly what it has begun. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { CaptureLab, type LabPod, OUTSIDE, type Peer } from './capture/lab.ts';

const POD = { ip4: '10.231.0.2', ip6: 'fd31::2' };

describe.each([
  ['IPv4', POD.ip4, OUTSIDE.ip4],
  ['IPv6', POD.ip6, OUTSIDE.ip6],
])('a drained pod (%s)', (_, own, outside) => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;
  let proxy: Peer;

  beforeEach(async () => {
    lab = new CaptureLab();
    capture = lab.open();
    pod = lab.addPod('a', POD.ip4, POD.ip6);
    capture.prepare(pod.pod);
    proxy = await lab.startProxy(capture, pod);
    capture.activate(pod.pod);
    await pod.serve('::', 8080);
    await lab.startOutside('serve', '::', '80');
  });
  afterEach(async () => await lab?.remove());

  const outward = (): unknown => pod.connect(outside, 80).answer;
  const inward = (port = 8080): unknown => lab.runOutside('connect', own, `${port}`).answer;
  const app = (address: string): unknown => expect.stringMatching(new RegExp(`^app \\[?(::ffff:)?${address}\\]?:`));

  /** The proxy's dial in a client's name, as after a request that it took over a tunnel. */
  async function claim(): Promise<unknown> {
    const from = proxy.lines.length;
    proxy.process.stdin?.write(`dial ${outside} 7777 ${own} 8080\n`);
    return (await proxy.next((line) => 'dial' in line, from)).dial;
  }

  it('speaks for itself, and is reached as itself, but the proxy still dials it and is reached by HBONE', async () => {
    expect(outward()).toContain('proxy outbound');
    expect(inward()).toContain('proxy plaintext');
    expect(await claim()).toMatchObject({ ok: true, answer: app(outside) });
    capture.drain(pod.pod.uid);
    capture.drain(pod.pod.uid);
    expect(outward()).toEqual(app(own));
    expect(inward()).toEqual(app(outside));
    expect(await claim()).toMatchObject({ ok: true, answer: app(outside) });
    expect(inward(15008)).toContain('proxy hbone');
    expect(capture.status()).toMatchObject([{ uid: pod.pod.uid, guard: expect.stringMatching(/^not attached/) }]);
    // Nothing of it was lost, which would be mended; and what is drained is not captured by mending.
    expect(capture.repair()).toEqual({ repinned: 0, reattached: 0, pods: [] });
    expect(outward()).toEqual(app(own));
    capture.release(pod.pod.uid);
    expect(capture.status()).toEqual([]);
    expect(outward()).toEqual(app(own));
    expect(lab.runOutside('connect', own, '15008')).toMatchObject({ ok: false });
  });

  it('is captured again, whole, when it is wanted again', async () => {
    capture.drain(pod.pod.uid);
    capture.prepare(pod.pod);
    expect(outward()).toEqual(app(own));
    // From here nothing more reaches the application past the proxy: what is passed now could be let in later.
    expect(inward()).toContain('proxy plaintext');
    capture.activate(pod.pod);
    expect(outward()).toContain('proxy outbound');
    expect(inward()).toContain('proxy plaintext');
    expect(capture.status()).toMatchObject([{ outbound: true, inbound: true, guard: 'attached' }]);
  });

  it('is found as not captured by the next agent', () => {
    capture.drain(pod.pod.uid);
    capture.close({ remove: false });
    capture = lab.open();
    expect(capture.adopted()).toMatchObject([{ uid: pod.pod.uid, state: 'prepared' }]);
    expect(outward()).toEqual(app(own));
    capture.release(pod.pod.uid);
    expect(capture.status()).toEqual([]);
  });
});
