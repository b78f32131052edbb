/** The capture outlives its agent, is adopted, shares the kernel with others, and leaves nothing when it is removed. */

import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { existsSync, openSync, readdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { removePins } from '../../src/agent/native-capture.ts';
import { closeFd, netnsAddresses, netnsCookie, netnsInode, openNetns } from '../../src/agent/netns.ts';
import { patient } from '../../src/lab/wait.ts';
import { bpfObjects, CaptureLab, cgroupRoot, OUTSIDE, run } from './capture/lab.ts';

const ADDON = new URL('../../native/build/Release/capture.node', import.meta.url).pathname;

describe('the capture', () => {
  let lab: CaptureLab;
  let before: Record<string, number[]>;

  beforeEach(() => {
    before = bpfObjects();
    lab = new CaptureLab();
  });
  afterEach(async () => await lab?.remove());

  /** What is in the kernel now that was not there at the start; ids are never reused. The kernel frees with a delay. */
  async function nothingLeft(): Promise<void> {
    await expect
      .poll(
        () => {
          const now = bpfObjects();
          return Object.entries(now).flatMap(([kind, ids]) =>
            ids.filter((id) => !before[kind]?.includes(id)).map((id) => `${kind} ${id}`),
          );
        },
        { timeout: patient(10_000) },
      )
      .toEqual([]);
  }

  it('leaves no program, link, map or pin when removed', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.prepare(pod.pod);
    await lab.startProxy(capture, pod);
    capture.activate(pod.pod);
    expect(pod.connect(OUTSIDE.ip4, 80).ok).toBe(true);
    expect(bpfObjects().link?.length).toBeGreaterThan(before.link?.length ?? 0);
    capture.close({ remove: true });
    await nothingLeft();
    expect(existsSync(lab.pinDirectory('agent'))).toBe(false);
    const server = await lab.startOutside('serve', '0.0.0.0', '80');
    expect(pod.connect(OUTSIDE.ip4, 80).answer).toMatch(/^app 10\.231\.0\.2:/);
    await server.stop();
  });

  it('forgets connections and listeners when they end', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.prepare(pod.pod);
    const proxy = await lab.startProxy(capture, pod);
    capture.activate(pod.pod);
    const server = await pod.serve('::', 8083);
    const outside = await lab.startOutside('serve', '::', '8090');
    const entries = (map: string) =>
      (JSON.parse(run('bpftool', '-j', 'map', 'dump', 'pinned', `${lab.pinDirectory('agent')}/v2/maps/${map}`)) as [])
        .length;
    for (const address of ['10.231.0.2', 'fd31::2']) {
      lab.runOutside('connect', address, '80');
      pod.connect(address.includes(':') ? OUTSIDE.ip6 : OUTSIDE.ip4, 80);
      pod.connect(address.includes(':') ? OUTSIDE.ip6 : OUTSIDE.ip4, 80, 'deferred');
    }
    for (const dial of ['10.231.0.77 1 10.231.0.2 8083', '10.231.0.77 1 10.231.0.2 1', `- 0 ${OUTSIDE.ip4} 8090`]) {
      const from = proxy.lines.length;
      proxy.process.stdin?.write(`dial ${dial}\n`);
      await proxy.next((line) => 'dial' in line, from);
    }
    const open = pod.start('connect', OUTSIDE.ip4, '80', 'hold');
    await open.next((line) => 'connected' in line);
    expect(entries('ebb_flows')).toBe(1);
    expect(entries('ebb_ports')).toBe(6);
    await open.stop();
    await proxy.stop();
    await server.stop();
    await outside.stop();
    await expect.poll(() => [entries('ebb_flows'), entries('ebb_ports')], { timeout: patient(10_000) }).toEqual([0, 0]);
    expect(capture.status()[0]?.listeners).toEqual({ outbound: 0, hbone: 0, plaintext: 0 });
  });

  it('leaves inbound connections to the application when asked', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const spec = { ...pod.pod, bypassInbound: true };
    capture.prepare(spec);
    const proxy = await lab.startProxy(capture, pod);
    capture.activate(spec);
    const server = await pod.serve('::', 8081);
    for (const address of spec.addresses) {
      expect(lab.runOutside('connect', address, '8081').answer).toMatch(/^app /);
    }
    expect(pod.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
    expect(capture.status()[0]?.guardDrops).toBe(0n);
    await proxy.stop();
    await server.stop();
  });

  it('is removed from outside when its agent is gone', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.activate(pod.pod);
    capture.close({ remove: false });
    expect(pod.connect(OUTSIDE.ip4, 80)).toMatchObject({ ok: false, errno: 1 });
    expect(removePins(lab.pinDirectory('agent'))).toBeGreaterThan(18);
    await nothingLeft();
    expect(existsSync(lab.pinDirectory('agent'))).toBe(false);
    expect(removePins(lab.pinDirectory('agent'))).toBe(0);
  });

  it('works on when the process that loaded it is killed, and is adopted', async () => {
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const loader = lab.open('agent');
    loader.prepare(pod.pod);
    const proxy = await lab.startProxy(loader, pod);
    loader.close({ remove: false });
    // Another process adopts, activates, and is killed.
    const script = `
      const { Capture, openNetns } = require(${JSON.stringify(ADDON)});
      const capture = new Capture({ cgroup: ${JSON.stringify(cgroupRoot())}, pinDirectory: ${JSON.stringify(lab.pinDirectory('agent'))} });
      const netnsFd = openNetns(${JSON.stringify(pod.path)});
      capture.activate({ uid: 'uid-a', netnsFd, addresses: ['10.231.0.2', 'fd31::2'], bypassInbound: false });
      console.log(capture.adopted()[0].state);
      setInterval(() => {}, 1000);`;
    const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] });
    const state = await new Promise((resolve) => child.stdout?.once('data', (data) => resolve(`${data}`.trim())));
    expect(state).toBe('prepared');
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await gone;

    expect(pod.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
    expect(lab.runOutside('connect', '10.231.0.2', '80').answer).toMatch(/^proxy plaintext /);

    const adopter = lab.open('agent');
    const cookie = netnsCookie(pod.pod.netnsFd);
    expect(adopter.adopted()).toMatchObject([{ uid: 'uid-a', cookie, state: 'captured' }]);
    expect([...(adopter.adopted()[0]?.addresses ?? [])].sort()).toEqual(['10.231.0.2', 'fd31::2']);
    adopter.prepare(pod.pod);
    adopter.activate(pod.pod);
    const [status] = adopter.status();
    expect(status).toMatchObject({ outbound: true, inbound: true, guard: 'attached', capturedConnections: 1n });
    expect(status?.listeners).toEqual({ outbound: 2, hbone: 2, plaintext: 2 });
    expect(pod.connect(OUTSIDE.ip6, 80).answer).toBe(`proxy outbound [${OUTSIDE.ip6}]:80`);
    await proxy.stop();
    adopter.close({ remove: true });
    await nothingLeft();
  });

  it('of two agents on one kernel captures the own pods only', async () => {
    const one = lab.open('one');
    const two = lab.open('two');
    const first = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const second = lab.addPod('b', '10.231.0.3', 'fd31::3');
    one.prepare(first.pod);
    two.prepare(second.pod);
    const proxyOne = await lab.startProxy(one, first, 1);
    const proxyTwo = await lab.startProxy(two, second, 1);
    one.activate(first.pod);
    two.activate(second.pod);
    expect(first.connect('10.231.0.3', 80).answer).toBe('proxy outbound 10.231.0.3:80');
    await proxyOne.next((line) => line.accepted === 'outbound');
    expect(second.connect('fd31::2', 80).answer).toBe('proxy outbound [fd31::2]:80');
    await proxyTwo.next((line) => line.accepted === 'outbound');
    one.close({ remove: true });
    expect(second.connect('10.231.0.2', 81).answer).toBe('proxy outbound 10.231.0.2:81');
    expect(two.status()).toMatchObject([{ outbound: true, inbound: true, guard: 'attached' }]);
    two.close({ remove: true });
    await nothingLeft();
  });

  it('refuses a second agent with the same pins', () => {
    lab.open('agent');
    expect(() => lab.open('agent')).toThrow(/another agent uses it/);
  });

  it('is released and taken again, and released when the namespace is gone', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const server = await lab.startOutside('serve', '0.0.0.0', '80');
    for (let i = 0; i < 2; i++) {
      capture.activate(pod.pod);
      capture.activate(pod.pod);
      expect(pod.connect(OUTSIDE.ip4, 80)).toMatchObject({ ok: false, errno: 1 });
      capture.release('uid-a');
      capture.release('uid-a');
      expect(pod.connect(OUTSIDE.ip4, 80).answer).toMatch(/^app 10\.231\.0\.2:/);
    }
    await server.stop();
    capture.activate(pod.pod);
    lab.removePod(pod);
    await expect
      .poll(() => capture.status()[0], { timeout: patient(10_000) })
      .toMatchObject({
        inbound: false,
        guard: expect.stringMatching(/^gone/),
      });
    capture.release('uid-a');
    expect(capture.status()).toEqual([]);
    expect(readdirSync(`${lab.pinDirectory('agent')}/v2/pods`)).toEqual([]);
  });

  it('does not trust a process that only listens as the proxy does', async () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    capture.activate(pod.pod);
    const servers = [];
    for (const port of [15001, 15006, 15008]) servers.push(await pod.serve('::', port));
    expect(capture.status()[0]?.listeners).toEqual({ outbound: 0, hbone: 0, plaintext: 0 });
    expect(pod.connect(OUTSIDE.ip4, 80)).toMatchObject({ ok: false, errno: 1 });
    expect(capture.status()[0]).toMatchObject({ refusedConnections: 1n, flows: 0 });
    expect(lab.runOutside('connect', '10.231.0.2', '15006', 'nonblock').ok).not.toBe(true);
    for (const server of servers) expect(server.lines).toHaveLength(1);
  });

  it('refuses what it cannot do, and says what', () => {
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const own = openNetns('/proc/self/ns/net');
    const mount = openSync('/dev/null', 'r');
    try {
      expect(() => capture.prepare({ ...pod.pod, netnsFd: own })).toThrow(/agent's own/);
      expect(() => capture.prepare({ ...pod.pod, netnsFd: mount })).toThrow(/not a namespace/);
      expect(() => capture.prepare({ ...pod.pod, netnsFd: 9999 })).toThrow(/Bad file descriptor/);
      expect(() => capture.prepare({ ...pod.pod, addresses: [] })).toThrow(/no address/);
      expect(() => capture.prepare({ ...pod.pod, addresses: ['10.0.0.256'] })).toThrow(/not an IP address/);
      expect(() => capture.prepare({ ...pod.pod, uid: '../../etc' })).toThrow(/cannot name pins/);
      expect(() => capture.trustProxy(4_000_000)).toThrow(/No such process/);
      for (const number of [Number.NaN, -1, 2 ** 32 + own, 1.5]) {
        expect(() => closeFd(number)).toThrow(/whole number/);
        expect(() => capture.trustProxy(number)).toThrow(/whole number/);
      }
      expect(() => openNetns('/proc/self/ns/mnt')).toThrow(/not of the network kind/);
      capture.prepare(pod.pod);
      expect(() => capture.prepare({ ...pod.pod, uid: 'other' })).toThrow(/belongs to pod uid-a/);
    } finally {
      closeFd(own);
      closeFd(mount);
    }
  });

  it('reads namespaces without entering them in Node', () => {
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    expect(netnsAddresses(pod.pod.netnsFd)).toEqual(expect.arrayContaining(['127.0.0.1', '10.231.0.2', 'fd31::2']));
    expect(netnsInode(pod.pod.netnsFd)).toBe(BigInt(run('stat', '-Lc', '%i', pod.path).trim()));
    expect(netnsCookie(pod.pod.netnsFd)).not.toBe(0n);
  });

  it('leaves getsockopt answers longer than a page alone', () => {
    lab.open();
    const code =
      'import socket,sys\n' +
      's=socket.create_server(("127.0.0.1",0))\n' +
      'import ctypes\n' +
      'libc=ctypes.CDLL(None,use_errno=True)\n' +
      'b=ctypes.create_string_buffer(b"x"*20000,20000); n=ctypes.c_uint(20000)\n' +
      'r=libc.getsockopt(s.fileno(),6,11,b,ctypes.byref(n))\n' +
      'print(r, n.value>=100, b.raw[19999:20000]==b"x")';
    expect(execFileSync('python3', ['-c', code], { encoding: 'utf8' }).trim()).toBe('0 True True');
  });
});

describe('bpf/capture.h', () => {
  it('has the same layout for BPF and C++', (context) => {
    const object = new URL('../../bpf/build/capture.bpf.o', import.meta.url).pathname;
    const { types } = JSON.parse(run('bpftool', '-j', 'btf', 'dump', 'file', object)) as {
      types: { kind: string; name: string; size: number; members?: { name: string; bits_offset: number }[] }[];
    };
    const shared = types.filter((type) => type.kind === 'STRUCT' && type.name.startsWith('ebb_'));
    expect(shared.map((type) => type.name).sort()).toEqual(
      [
        ...['address_key', 'decision', 'flow', 'held', 'hold_settings', 'listener_key', 'listening', 'newcomer'],
        ...['owner_key', 'pod', 'port_key', 'prober', 'proxy', 'socket', 'stats', 'tuple', 'uid'],
      ].map((name) => `ebb_${name}`),
    );
    const lines = shared.flatMap((type) => [
      `static_assert(sizeof(${type.name}) == ${type.size});`,
      ...(type.members ?? []).map(
        (member) => `static_assert(offsetof(${type.name}, ${member.name}) == ${member.bits_offset / 8});`,
      ),
    ]);
    expect(lines.length).toBeGreaterThan(40);
    const include = new URL('../../bpf', import.meta.url).pathname;
    const source = `#include <cstddef>\n#include <capture.h>\n${lines.join('\n')}\n`;
    const result = spawnSync('g++', ['-std=c++20', '-fsyntax-only', `-I${include}`, '-x', 'c++', '-'], {
      input: source,
      encoding: 'utf8',
    });
    // In a guest, where nothing is built.
    if (result.error && 'code' in result.error && result.error.code === 'ENOENT') context.skip('there is no g++ here');
    expect(result.stderr).toBe('');
    expect(result.status).toBe(0);
  });
});
