import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CniNamespaces } from '../../src/agent/cni-netns.ts';
import { PodProcesses, podUidOf, startTicksOf } from '../../src/agent/pod-processes.ts';

const UID = '0b2c4d6e-1111-4222-8333-a0b1c2d3e4f5';
const OTHER = '1b2c4d6e-1111-4222-8333-a0b1c2d3e4f5';
const SLICE = UID.replaceAll('-', '_');
const ID = 'd'.repeat(64);

describe('the pod of a process', () => {
  it.each([
    ['cgroupfs, v2', `0::/kubepods/besteffort/pod${UID}/${ID}\n`],
    ['cgroupfs, guaranteed', `0::/kubepods/pod${UID}/${ID}\n`],
    [
      'systemd, containerd',
      `0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod${SLICE}.slice/cri-containerd-${ID}.scope\n`,
    ],
    [
      'systemd, CRI-O',
      `0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod${SLICE}.slice/crio-${ID}.scope\n`,
    ],
    [
      'systemd driver of the kubelet, cgroupfs of containerd',
      `0::/system.slice/containerd.service/kubepods-besteffort-pod${SLICE}.slice:cri-containerd:${ID}\n`,
    ],
    ['v1', `12:cpu,cpuacct:/kubepods/burstable/pod${UID}/${ID}\n11:memory:/kubepods/burstable/pod${UID}/${ID}\n`],
    [
      'hybrid, where v2 is not the kubelet’s',
      `9:pids:/kubepods/besteffort/pod${UID}/${ID}\n1:name=systemd:/kubepods/besteffort/pod${UID}/${ID}\n0::/system.slice/containerd.service\n`,
    ],
    [
      'kind',
      `0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod${SLICE}.slice/cri-containerd-${ID}.scope\n`,
    ],
    ['seen from a cgroup namespace', `0::/../../pod${UID}/${ID}\n`],
    ['with what the pod made below its own', `0::/kubepods/besteffort/pod${UID}/${ID}/kubepods/pod${OTHER}/x\n`],
    ['upper case', `0::/kubepods/besteffort/pod${UID.toUpperCase()}/${ID}\n`],
  ])('is found: %s', (_, cgroup) => expect(podUidOf(cgroup)).toBe(UID));

  it('is found of a static pod, whose UID has no dashes', () => {
    const uid = '0123456789abcdef0123456789abcdef';
    expect(podUidOf(`0::/kubepods/pod${uid}/${ID}\n`)).toBe(uid);
  });

  it.each([
    ['the host', '0::/system.slice/ssh.service\n'],
    ['a container of nobody', `0::/docker/${ID}\n`],
    ['a name that goes on', `0::/kubepods/pod${UID}0/${ID}\n`],
    ['a name that begins before', `0::/kubepods/mypod${UID}/${ID}\n`],
    ['hierarchies that differ', `2:memory:/kubepods/pod${UID}/x\n0::/kubepods/pod${OTHER}/x\n`],
    ['nothing', ''],
  ])('is nobody’s: %s', (_, cgroup) => expect(podUidOf(cgroup)).toBeUndefined());
});

it('the start of a process is read past a name with spaces and parentheses', () => {
  const fields = Array.from({ length: 30 }, (_, index) => String(index + 4)).join(' ');
  expect(startTicksOf(`7 (a) b (c) S ${fields}`)).toBe(22n);
  expect(() => startTicksOf('7 (a)')).toThrow(/start time/);
});

describe('a tree of processes', () => {
  let proc: string;
  let now = 0;
  let processes: PodProcesses;

  beforeEach(() => {
    proc = mkdtempSync(join(tmpdir(), 'agent-proc-'));
    // Network namespaces are files here: what counts is which of them are the same.
    for (const name of ['host', 'a', 'b', 'c']) writeFileSync(join(proc, `ns-${name}`), '');
    now = 0;
    processes = new PodProcesses({ proc, maxAgeMs: 50, now: () => now });
    add(1, 'host', '0::/init.scope\n', 0);
  });
  afterEach(() => rmSync(proc, { recursive: true, force: true }));

  function add(pid: number, netns: string, cgroup: string, started: number): void {
    const directory = join(proc, String(pid));
    mkdirSync(join(directory, 'ns'), { recursive: true });
    symlinkSync(join(proc, `ns-${netns}`), join(directory, 'ns', 'net'));
    writeFileSync(join(directory, 'cgroup'), cgroup);
    const zeros = Array.from({ length: 18 }, () => '0').join(' ');
    writeFileSync(join(directory, 'stat'), `${pid} (x) S ${zeros} ${started} 0 0\n`);
  }
  const ofPod = (uid: string) => `0::/kubepods/besteffort/pod${uid}/${ID}\n`;
  const pids = (uid: string) => processes.of(uid).map(({ pid }) => pid);

  it('gives a pod’s process of each namespace, the oldest first, without those in the node’s own', () => {
    add(30, 'a', ofPod(UID), 500);
    add(20, 'b', ofPod(UID), 900);
    add(25, 'a', ofPod(UID), 700);
    add(40, 'host', ofPod(UID), 1);
    add(50, 'c', ofPod(OTHER), 2);
    expect(pids(UID)).toEqual([30, 20]);
    expect(pids(OTHER)).toEqual([50]);
    expect(pids('2b2c4d6e-1111-4222-8333-a0b1c2d3e4f5')).toEqual([]);
  });

  it('tells which pods are in a namespace', () => {
    add(30, 'a', ofPod(UID), 500);
    add(31, 'a', ofPod(OTHER), 500);
    const [first] = processes.of(UID);
    expect([...processes.podsIn(first?.netns ?? 0n)].sort()).toEqual([UID, OTHER].sort());
    expect(processes.podsIn(0n).size).toBe(0);
  });

  it('reads more seldom where that takes long', () => {
    add(30, 'a', ofPod(UID), 500);
    // Each look at the clock is 20 ms later: so long a scan takes.
    const slow = new PodProcesses({
      proc,
      maxAgeMs: 50,
      now: () => {
        now += 20;
        return now;
      },
    });
    expect(slow.of(UID)).toHaveLength(1);
    add(31, 'b', ofPod(OTHER), 500);
    now += 40;
    expect(slow.of(OTHER)).toHaveLength(0);
    now += 30;
    expect(slow.of(OTHER)).toHaveLength(1);
  });

  it('reads again only when what it knows is old, and passes over what ends meanwhile', () => {
    add(30, 'a', ofPod(UID), 500);
    expect(pids(UID)).toEqual([30]);
    add(31, 'b', ofPod(OTHER), 500);
    now = 50;
    expect(pids(OTHER)).toEqual([]);
    now = 51;
    expect(pids(OTHER)).toEqual([31]);
    rmSync(join(proc, '31', 'stat'));
    rmSync(join(proc, '30', 'ns'), { recursive: true });
    mkdirSync(join(proc, 'sys'));
    now = 200;
    expect([...pids(UID), ...pids(OTHER)]).toEqual([]);
  });
});

describe('mounted namespaces', () => {
  let directory: string;
  let now: number;
  let held: Map<string, string[]>;
  let looks: string[];
  let namespaces: CniNamespaces;

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'agent-cni-'));
    now = 0;
    held = new Map();
    looks = [];
    const addresses = (path: string): readonly string[] => {
      const name = path.slice(directory.length + 1);
      looks.push(name);
      const found = held.get(name);
      if (found === undefined) throw new Error('not a namespace');
      return found;
    };
    namespaces = new CniNamespaces(directory, { addresses }, () => now);
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));
  const names = (...addresses: string[]) =>
    namespaces.holding(new Set(addresses)).map(({ path }) => path.slice(directory.length + 1));

  it('are found by an address, never by one that all of them have', () => {
    for (const name of ['cni-a', 'cni-b', 'other']) writeFileSync(join(directory, name), '');
    held.set('cni-a', ['127.0.0.1', '::1', 'fe80::1', '10.0.0.1', 'fd00::1']).set('cni-b', ['127.0.0.1', '10.0.0.2']);
    expect(names('10.0.0.2')).toEqual(['cni-b']);
    expect(names('fd00::1')).toEqual(['cni-a']);
    expect(names('127.0.0.1', '::1', 'fe80::1')).toEqual([]);
  });

  it('are looked into again soon until they have an address, then seldom, and at once when they are others', () => {
    const path = join(directory, 'cni-a');
    writeFileSync(path, '');
    held.set('cni-a', ['127.0.0.1']);
    expect(names('10.0.0.1')).toEqual([]);
    held.set('cni-a', ['10.0.0.1']);
    expect(names('10.0.0.1')).toEqual([]);
    now = 100;
    expect(names('10.0.0.1')).toEqual(['cni-a']);
    now = 1000;
    expect(names('10.0.0.1')).toEqual(['cni-a']);
    expect(looks).toHaveLength(2);
    writeFileSync(`${path}.new`, '');
    rmSync(path);
    writeFileSync(join(directory, 'cni-b'), '');
    expect(names('10.0.0.1')).toEqual([]);
  });

  it('are none where the directory is missing', () => {
    rmSync(directory, { recursive: true });
    expect(names('10.0.0.1')).toEqual([]);
  });
});
