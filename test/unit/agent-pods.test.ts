import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { AdoptedPod, Capture, CapturePod } from '../../src/agent/capture.ts';
import type { NetnsFinder } from '../../src/agent/pod-netns.ts';
import { Pods } from '../../src/agent/pods.ts';
import { ConnectionLost, ProxyRefusal, type ZdsWorkload } from '../../src/agent/zds-connection.ts';
import { NoProxy, type ProxyView } from '../../src/agent/zds-server.ts';
import type { Namespace, ObjectSet, Pod } from '../../src/mesh/kubernetes.ts';

/** The kernel, proxies and namespaces, each writing down what it was asked: the kernel part has tests of its own. */
class World {
  readonly steps: string[] = [];
  readonly captured = new Map<string, CapturePod>();
  readonly openFds = new Set<number>();
  adopted: AdoptedPod[] = [];
  /** Cookie of the network namespace at a path; missing: cannot be opened. */
  readonly cookies = new Map<string, bigint>([['/netns/p', 1n]]);
  proxy: 'serves' | 'absent' | 'refuses' | 'silent' = 'serves';
  failing = new Set<string>();
  #fd = 100;

  readonly capture: Capture = {
    trustProxy: () => {},
    distrustProxy: () => {},
    trustProber: () => {},
    distrustProber: () => {},
    decide: () => {},
    forget: () => {},
    decided: () => [],
    held: () => [],
    heldTotals: () => ({ pods: 0, unseen: 0, refusedConnects: 0, delayedConnects: 0, refusedInbound: 0 }),
    prepare: (pod) => this.#step('prepare', pod.uid, pod),
    activate: (pod) => {
      this.#step('activate', pod.uid, pod);
      this.captured.set(pod.uid, pod);
      return undefined;
    },
    drain: (uid) => {
      this.#step('drain', uid);
      this.captured.delete(uid);
    },
    release: (uid) => {
      this.#step('release', uid);
      this.captured.delete(uid);
    },
    adopted: () => this.adopted,
    origin: () => 'nothing',
    repair: () => ({ repinned: 0, reattached: 0, pods: [] }),
    removeStrays: () => 0,
    status: () => [],
    close: () => {},
  };
  readonly proxies = {
    add: async (workload: ZdsWorkload): Promise<void> => {
      this.steps.push(`add ${workload.uid}`);
      expect(this.openFds.has(workload.netnsFd() ?? -1)).toBe(true);
      if (this.proxy === 'absent') throw new NoProxy('waiting for proxy');
      if (this.proxy === 'refuses') throw new ProxyRefusal('no room');
      if (this.proxy === 'silent') {
        await new Promise((resolve) => setTimeout(resolve, 5000));
        throw new ConnectionLost('no answer');
      }
    },
    del: async (uid: string): Promise<void> => {
      this.steps.push(`del ${uid}`);
    },
    view: (): ProxyView =>
      this.proxy === 'serves' ? { serves: true } : { serves: false, reason: `proxy ${this.proxy}` },
  };
  readonly netns: NetnsFinder = {
    open: ({ netnsPath: path }) => {
      if (path === undefined) throw new Error('nowhere to be found');
      const cookie = this.cookies.get(path);
      if (cookie === undefined) throw new Error(`${path}: no such network namespace`);
      this.#fd++;
      this.openFds.add(this.#fd);
      return { fd: this.#fd, inode: cookie, cookie };
    },
    close: ({ fd }) => {
      expect(this.openFds.delete(fd)).toBe(true);
    },
  };

  #step(what: string, uid: string, pod?: CapturePod): void {
    if (pod !== undefined) expect(this.openFds.has(pod.netnsFd)).toBe(true);
    if (this.failing.has(what)) throw new Error(`${what} failed`);
    this.steps.push(`${what} ${uid}`);
  }
}

let world: World;
let pods: Pods;

const podObject = (
  more: { labels?: Record<string, string>; annotations?: Record<string, string>; phase?: string; ip?: string } = {},
): Pod => ({
  metadata: {
    name: 'p',
    namespace: 'team',
    uid: 'p',
    labels: more.labels ?? {},
    annotations: { 'ebbtide.dev/netns': '/netns/p', ...more.annotations },
  },
  spec: { nodeName: 'n1' },
  status: { phase: more.phase ?? 'Running', podIP: more.ip ?? '10.0.0.1' },
});
const team = (mode = 'ambient'): Namespace => ({
  metadata: { name: 'team', labels: { 'istio.io/dataplane-mode': mode } },
});
const objects = (podList: Pod[], namespace = team()): ObjectSet => ({
  namespaces: [namespace],
  nodes: [],
  pods: podList,
  services: [],
  endpointSlices: [],
  authorizationPolicies: [],
  peerAuthentications: [],
});
const open = (): void => {
  pods = new Pods({
    nodeName: 'n1',
    capture: world.capture,
    proxies: world.proxies,
    netns: world.netns,
    log: pino({ level: 'silent' }),
    random: () => 1,
  });
};
const pass = (ms: number) => vi.advanceTimersByTimeAsync(ms);
const state = () => pods.report().map((report) => [report.state, report.reason]);
/** The steps since the last call. */
const steps = () => world.steps.splice(0);

beforeEach(() => {
  vi.useFakeTimers();
  world = new World();
  open();
});
afterEach(() => {
  pods.stop();
  // Whatever happened, no descriptor of a network namespace stays open: it would keep the pod's network alive.
  expect(world.openFds.size).toBe(0);
  vi.useRealTimers();
});

describe('a pod that comes', () => {
  it('is prepared, told, activated, in this order', async () => {
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
    expect(state()).toEqual([['captured', '']]);
  });

  it('is captured at once without a proxy, so that it fails closed, and says so', async () => {
    world.proxy = 'absent';
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
    expect(state()).toEqual([['captured', 'proxy absent']]);
  });

  it.each(['refuses', 'silent'] as const)('is captured when the proxy %s', async (proxy) => {
    world.proxy = proxy;
    pods.apply(objects([podObject()]), true);
    await pass(5000);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
    expect(world.captured.has('p')).toBe(true);
  });

  it('is waited for without end while its network namespace is not there', async () => {
    world.cookies.clear();
    pods.apply(objects([podObject()]), true);
    expect(state()).toEqual([['waiting', '/netns/p: no such network namespace']]);
    // 100, 200, 400, ... to 5000 ms: after 60 s it is still tried.
    await pass(60_000);
    expect(steps()).toEqual([]);
    world.cookies.set('/netns/p', 1n);
    await pass(5000);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
  });

  it('whose namespace is not found waits and says why', async () => {
    pods.apply(objects([podObject({ annotations: { 'ebbtide.dev/netns': '' } })]), true);
    expect(state()[0]?.[1]).toBe('nowhere to be found');
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(state()).toEqual([['captured', '']]);
  });

  it.each(['prepare', 'activate'])('is tried again when the kernel refuses to %s it', async (step) => {
    world.failing.add(step);
    pods.apply(objects([podObject()]), true);
    await pass(1000);
    expect(state()).toEqual([['waiting', `${step} failed`]]);
    world.failing.clear();
    await pass(5000);
    expect(world.captured.has('p')).toBe(true);
  });

  it('of another node is none of ours; two with one uid are not mixed up', async () => {
    const other = podObject();
    pods.apply(objects([{ ...other, spec: { nodeName: 'n2' } }]), true);
    await pass(0);
    expect([steps(), pods.report()]).toEqual([[], []]);
    const twin: Pod = { ...other, metadata: { ...other.metadata, name: 'twin' } };
    pods.apply(objects([other, twin]), true);
    await pass(0);
    expect(pods.report().map(({ name }) => name)).toEqual(['p']);
  });

  it('tells why it is not enrolled', () => {
    pods.apply(objects([{ ...podObject(), spec: { nodeName: 'n1', hostNetwork: true } }]), true);
    expect(state()).toEqual([['not enrolled', 'uses the network of the node (hostNetwork)']]);
  });
});

describe('a pod that is captured', () => {
  beforeEach(async () => {
    pods.apply(objects([podObject()]), true);
    await pass(0);
    steps();
  });

  it('is let go half a second after it is un-labelled, its own network first', async () => {
    pods.apply(objects([podObject()], team('none')), true);
    await pass(499);
    expect(steps()).toEqual([]);
    expect(state()).toEqual([['leaving', 'not labelled']]);
    await pass(1);
    expect(steps()).toEqual(['drain p']);
    // What it has open through the proxy may end by itself.
    await pass(1999);
    expect(steps()).toEqual([]);
    await pass(1);
    expect(steps()).toEqual(['del p', 'release p']);
    expect(state()).toEqual([['not enrolled', 'not labelled']]);
  });

  it('is captured again when it is labelled while its last connections end, and the proxy keeps it', async () => {
    pods.apply(objects([podObject()], team('none')), true);
    await pass(1000);
    expect(steps()).toEqual(['drain p']);
    pods.apply(objects([podObject()]), true);
    await pass(10_000);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
    expect(state()).toEqual([['captured', '']]);
  });

  it('stays captured when it is labelled again in time', async () => {
    pods.apply(objects([podObject({ labels: { 'istio.io/dataplane-mode': 'none' } })]), true);
    await pass(300);
    pods.apply(objects([podObject()]), true);
    await pass(5000);
    expect(steps()).not.toContain('drain p');
    expect(state()).toEqual([['captured', '']]);
  });

  it.each([
    ['deleted', () => pods.apply(objects([]), true)],
    ['ended', () => pods.apply(objects([podObject({ phase: 'Succeeded' })]), true)],
  ])('is let go at once when it is %s', async (_, change) => {
    change();
    await pass(0);
    expect(steps()).toEqual(['del p', 'release p']);
  });

  it('stays while a manifest cannot be read, and while its status has lost its address', async () => {
    pods.apply(objects([]), false);
    pods.apply(objects([podObject({ ip: '' })]), true);
    await pass(10_000);
    expect(steps()).toEqual([]);
    expect(state()[0]?.[0]).toBe('captured');
  });

  it('stays captured when its namespace cannot be found or the kernel refuses a change', async () => {
    world.cookies.clear();
    await pass(5000);
    expect(state()).toEqual([['captured', '/netns/p: no such network namespace']]);
    world.failing.add('activate');
    world.cookies.set('/netns/p', 1n);
    pods.apply(objects([podObject({ annotations: { 'ambient.istio.io/bypass-inbound-capture': 'true' } })]), true);
    await pass(100);
    expect(state()).toEqual([['captured', 'activate failed']]);
    expect(world.captured.get('p')?.bypassInbound).toBe(false);
    world.failing.clear();
    await pass(5000);
    expect(world.captured.get('p')?.bypassInbound).toBe(true);
    expect(world.steps).not.toContain('release p');
  });

  it('is captured anew when its network namespace is replaced', async () => {
    world.cookies.set('/netns/p', 2n);
    await pass(5000);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
  });

  it('is not touched by states that do not change it', async () => {
    pods.apply(objects([podObject()]), true);
    pods.apply(objects([podObject({ labels: { other: 'x' } })]), true);
    await pass(20_000);
    expect(steps()).toEqual([]);
  });

  it('is let go again and again until the kernel does', async () => {
    world.failing.add('release');
    pods.apply(objects([]), true);
    await pass(1000);
    expect(world.captured.has('p')).toBe(true);
    world.failing.clear();
    await pass(5000);
    expect(world.captured.has('p')).toBe(false);
    expect(pods.report()).toEqual([]);
  });

  it('is let go with all others at the end', async () => {
    await pods.releaseAll();
    expect(steps()).toEqual(['release p', 'del p']);
  });
});

describe('a pod that was captured before', () => {
  beforeEach(() => {
    pods.stop();
    world.adopted = [{ uid: 'p', cookie: 1n, state: 'captured', addresses: ['10.0.0.1'] }];
    open();
  });

  it('is kept without a gap, and told to the proxy again', async () => {
    expect(pods.workloads().map(({ uid, netnsFd }) => [uid, netnsFd()])).toEqual([['p', undefined]]);
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(steps()).toEqual(['prepare p', 'add p', 'activate p']);
    expect(pods.workloads()[0]?.netnsFd()).toBeGreaterThan(0);
  });

  it('is kept while its network namespace is not found', async () => {
    world.cookies.clear();
    pods.apply(objects([podObject()]), true);
    await pass(10_000);
    expect(steps()).toEqual([]);
    expect(state()[0]?.[0]).toBe('captured');
    expect(pods.workloads()[0]?.uid).toBe('p');
  });

  it('is let go when it is not wanted any more, as one that this agent captured', async () => {
    pods.apply(objects([podObject()], team('none')), true);
    await pass(499);
    expect(steps()).toEqual([]);
    await pass(1);
    expect(steps()).toEqual(['drain p']);
    await pass(2000);
    expect(steps()).toEqual(['del p', 'release p']);
    expect(state()).toEqual([['not enrolled', 'not labelled']]);
  });

  it('is let go at once when it has ended', async () => {
    pods.apply(objects([podObject({ phase: 'Succeeded' })]), true);
    await pass(0);
    expect(steps()).toEqual(['del p', 'release p']);
  });

  it('is let go when it is in no manifest, but not while one cannot be read', async () => {
    pods.apply(objects([]), false);
    await pass(10_000);
    expect(steps()).toEqual([]);
    expect(state()[0]?.[0]).toBe('adopted');
    pods.apply(objects([]), true);
    expect(steps()).toEqual(['release p', 'del p']);
    expect(pods.report()).toEqual([]);
  });
});

describe('a network namespace', () => {
  it('is known as that of a pod, in the mesh or not, by its cookie', async () => {
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(pods.ofNetns(1n)).toBe('team/p');
    expect(pods.ofNetns(2n)).toBeUndefined();
    pods.apply(objects([podObject()], team('none')), true);
    await pass(1000);
    expect(pods.report()[0]?.state).toBe('leaving');
    expect(pods.ofNetns(1n)).toBe('team/p');
    await pass(2000);
    expect(pods.report()[0]?.state).toBe('not enrolled');
    expect(pods.ofNetns(1n)).toBe('team/p');
    world.cookies.clear();
    // What was found is believed for some seconds.
    await pass(5000);
    expect(pods.ofNetns(1n)).toBeUndefined();
  });

  it('is known while its pod waits, and where an agent before this one captured it', async () => {
    world.failing.add('prepare');
    pods.apply(objects([podObject()]), true);
    await pass(0);
    expect(pods.ofNetns(1n)).toBe('team/p');
    pods.stop();
    world.adopted = [{ uid: 'q', cookie: 5n, state: 'captured', addresses: [] }];
    open();
    expect(pods.ofNetns(5n)).toBe('q');
  });
});
