/** Kubelet's probes: they reach the application of a captured pod past the proxy, and nobody else's connections do. */

import { writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Capture } from '../../src/agent/capture.ts';
import { patient } from '../../src/lab/wait.ts';
import {
  CaptureLab,
  type Json,
  type LabPod,
  makeCgroup,
  NODE,
  OUTSIDE,
  type Peer,
  removeCgroup,
  run,
} from './capture/lab.ts';

const POD = ['10.231.0.2', 'fd31::2'] as const;
const shown = (address: string): string => (address.includes(':') ? `[${address}]` : address);

describe('the kubelet', () => {
  let lab: CaptureLab;
  let capture: Capture;
  let pod: LabPod;
  let proxy: Peer;
  let server: Peer;
  let kubelet: Peer;

  beforeEach(async () => {
    lab = new CaptureLab();
    lab.addNodeAddresses();
    capture = lab.open();
    pod = lab.addPod('a', ...POD);
    capture.prepare(pod.pod);
    proxy = await lab.startProxy(capture, pod, 1);
    capture.activate(pod.pod);
    server = await pod.serve('::', 8080);
    kubelet = await lab.startProber();
  });
  afterEach(async () => {
    await lab?.remove();
    removeCgroup(`ebb-test-kubelet-${process.pid}`);
  });

  /** Connects that often; tells how many reached the application, and what was answered to the last one. */
  async function probe(address: string, times = 1, source = 0, port = 8080, peer = kubelet): Promise<Json> {
    const from = peer.lines.length;
    peer.process.stdin?.write(`${address} ${port} ${source} ${times}\n`);
    return await peer.next((line) => 'direct' in line, from, 60_000);
  }

  function flows(): number {
    const maps = `${lab.pinDirectory('agent')}/v2/maps`;
    return Number(run('sh', '-c', `bpftool map dump pinned ${maps}/ebb_flows | grep -c '"kind":'; true`));
  }

  it('reaches the application directly once it is trusted, by its real address, and leaves nothing', {
    timeout: patient(60_000),
  }, async () => {
    const calls = (): Json[] => server.lines.filter((line) => 'accepted' in line);
    for (const address of POD) expect((await probe(address)).answer).toMatch(/^proxy plaintext /);
    expect(calls()).toEqual([]);
    const proxied = (): number => proxy.lines.filter((line) => 'accepted' in line).length;
    await expect.poll(proxied).toBe(2);
    capture.trustProber(kubelet.process.pid as number);
    expect(await probe(POD[0], 300)).toMatchObject({ direct: 300, errno: 0 });
    expect(await probe(POD[1], 300)).toMatchObject({ direct: 300, errno: 0 });
    await expect.poll(() => calls().length).toBe(600);
    expect(proxied()).toBe(2);
    expect(calls()[0]?.getpeername).toMatch(/^\[::ffff:10\.231\.0\.1\]:\d+$/);
    expect(calls()[599]?.getpeername).toMatch(/^\[fd31::1\]:\d+$/);
    expect(capture.status()[0]).toMatchObject({ probeConnections: 600n, guardDrops: 0n });
    await proxy.stop();
    await expect.poll(flows, { timeout: patient(10_000) }).toBe(0);
  });

  it('goes on while the proxy is down, and finds out that an application is', async () => {
    capture.trustProber(kubelet.process.pid as number);
    await proxy.stop();
    for (const address of POD) expect(await probe(address)).toMatchObject({ direct: 1 });
    expect(lab.runHere('connect', POD[0], '8080')).toMatchObject({ ok: false });
    await server.stop();
    for (const address of POD) expect(await probe(address)).toMatchObject({ direct: 0, errno: 111 });
  });

  it('may use one source port over and over', async () => {
    capture.trustProber(kubelet.process.pid as number);
    for (const address of POD) expect(await probe(address, 50, 40_123)).toMatchObject({ direct: 50, errno: 0 });
    // The tuple that was the kubelet's is nobody's now.
    for (const address of POD) {
      const bind = `bind=${address === POD[0] ? NODE.ip4 : NODE.ip6}/40123`;
      expect(lab.runHere('connect', address, '8080', bind).answer).toMatch(/^proxy plaintext /);
    }
  });

  it('does not open the way for other processes of the node, nor for itself elsewhere', async () => {
    const other = await lab.startProber();
    capture.trustProber(kubelet.process.pid as number);
    for (const address of POD) {
      expect(await probe(address)).toMatchObject({ direct: 1 });
      expect(await probe(address, 20, 0, 8080, other)).toMatchObject({
        direct: 0,
        answer: expect.stringMatching(/^proxy plaintext /),
      });
      expect(lab.runHere('connect', address, '8080', 'setuid=65534').answer).toMatch(/^proxy plaintext /);
    }
    const plain = lab.addPod('b', '10.231.0.3', 'fd31::3');
    kubelet.process.stdin?.write(`enter ${plain.path}\n`);
    await kubelet.next((line) => 'entered' in line);
    for (const address of POD) expect((await probe(address)).answer).toMatch(/^proxy plaintext /);
    kubelet.process.stdin?.write('enter /proc/1/ns/net\n');
  });

  it('is not believed any more when it is distrusted, in another cgroup, or dead', async () => {
    const pid = kubelet.process.pid as number;
    capture.trustProber(pid);
    expect(await probe(POD[0])).toMatchObject({ direct: 1 });
    const name = `ebb-test-kubelet-${process.pid}`;
    writeFileSync(`${makeCgroup(name)}/cgroup.procs`, `${pid}`);
    expect((await probe(POD[0])).answer).toMatch(/^proxy plaintext /);
    capture.trustProber(pid);
    expect(await probe(POD[1])).toMatchObject({ direct: 1 });
    capture.close({ remove: false });
    capture = lab.open();
    expect(await probe(POD[1])).toMatchObject({ direct: 1 });
    capture.distrustProber(pid);
    expect((await probe(POD[1])).answer).toMatch(/^proxy plaintext /);
    await kubelet.stop();
    expect(() => capture.trustProber(pid)).toThrow(/process \d+/);
    const inPod = await pod.serve('::', 8099);
    expect(() => capture.trustProber(inPod.process.pid as number)).toThrow(/namespace of pod/);
  });

  it('has its own namespace where several nodes share a kernel', async () => {
    const node = lab.addPod('n', '10.231.0.4', 'fd31::4');
    const elsewhere = node.start('prober');
    await elsewhere.next((line) => line.ready === true);
    capture.trustProber(elsewhere.process.pid as number);
    for (const address of POD) expect(await probe(address, 1, 0, 8080, elsewhere)).toMatchObject({ direct: 1 });
    expect((await probe(POD[0])).answer).toMatch(/^proxy plaintext /);
  });

  it('reaches no listener of the proxy, and pods that bypass capture as before', async () => {
    capture.trustProber(kubelet.process.pid as number);
    const { ready } = proxy.lines.find((line) => 'ready' in line) as { ready: string[] };
    const port = Number(ready[0]?.split(':').at(-1));
    expect(await probe(POD[0], 1, 0, port)).toMatchObject({ direct: 0, errno: expect.any(Number), answer: '' });
    capture.activate({ ...pod.pod, bypassInbound: true });
    for (const address of POD) expect(await probe(address)).toMatchObject({ direct: 1 });
  });

  it('cannot be forged by a host that takes its address and all packets to it', async () => {
    capture.trustProber(kubelet.process.pid as number);
    for (const address of POD) expect(await probe(address, 3, 40_123)).toMatchObject({ direct: 3 });
    run('ip', 'address', 'del', `${NODE.ip4}/24`, 'dev', lab.bridge);
    run('ip', 'address', 'del', `${NODE.ip6}/64`, 'dev', lab.bridge);
    const outside = pod.netns.replace(/-a$/, '-out');
    const mac = run('ip', '-n', outside, '-br', 'link', 'show', 'eth0').split(/\s+/)[2] as string;
    for (const [ip, size] of [
      [NODE.ip4, 32],
      [NODE.ip6, 128],
    ] as const) {
      run('ip', '-n', outside, 'address', 'add', `${ip}/${size}`, 'dev', 'eth0', ...(size === 128 ? ['nodad'] : []));
      run('ip', '-n', pod.netns, 'neighbour', 'replace', ip, 'lladdr', mac, 'dev', 'eth0');
    }
    const seen = server.lines.length;
    for (const [address, from] of [
      [POD[0], NODE.ip4],
      [POD[1], NODE.ip6],
    ] as const) {
      for (const port of [40_123, 40_124]) {
        expect(lab.runOutside('connect', address, '8080', `bind=${from}/${port}`).answer).toMatch(
          new RegExp(`^proxy plaintext .*${address.replace(/\./g, '\\.')}`),
        );
      }
      expect(lab.runOutside('connect', address, '8080').peer).toBe(`${shown(address)}:8080`);
    }
    expect(server.lines).toHaveLength(seen);
    expect(OUTSIDE.ip4).not.toBe(NODE.ip4);
  });
});
