/** Pods, a stand-in for the proxy and an outside host for the capture tests: namespaces on a bridge in the test's own namespace. */

import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Capture, CapturePod, HoldOptions } from '../../../src/agent/capture.ts';
import { openCapture } from '../../../src/agent/native-capture.ts';
import { closeFd, openNetns } from '../../../src/agent/netns.ts';
import { patient } from '../../../src/lab/wait.ts';
import { buildPeerCommand } from './build-peer.ts';

/** The peer, compiled beforehand, where compiling it for each lab would take too long; empty: it is compiled. */
const COMPILED = process.env.EBBTIDE_TEST_PEER ?? '';
export const OUTSIDE = { ip4: '10.231.0.9', ip6: 'fd31::9' };
/** The node's own addresses, once `addNodeAddresses` was called. */
export const NODE = { ip4: '10.231.0.1', ip6: 'fd31::1' };

/** Output of a command; throws with its stderr when it fails. */
export function run(...argv: string[]): string {
  const [command, ...rest] = argv;
  return execFileSync(command as string, rest, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Lines for one `ip`, where a process for each would take most of a lab's time in a guest. */
function ipBatch(lines: readonly string[], ...options: string[]): void {
  execFileSync('ip', [...options, '-batch', '-'], { input: `${lines.join('\n')}\n`, stdio: ['pipe', 'pipe', 'pipe'] });
}

/** Mount point of cgroup2. */
export function cgroupRoot(): string {
  const line = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .find((each) => each.includes(' - cgroup2 '));
  if (!line) throw new Error('no cgroup2 mount; mount -t cgroup2 none /sys/fs/cgroup/unified');
  return line.split(' ')[4] as string;
}

export interface Json {
  readonly [key: string]: unknown;
}

/** A peer that runs beside the test; what it prints is kept. */
export class Peer {
  readonly process: ChildProcess;
  readonly lines: Json[] = [];
  #waiting: (() => void)[] = [];

  constructor(argv: readonly string[]) {
    this.process = spawn(argv[0] as string, argv.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] });
    createInterface({ input: this.process.stdout as NodeJS.ReadableStream }).on('line', (line) => {
      this.lines.push(JSON.parse(line) as Json);
      for (const wake of this.#waiting.splice(0)) wake();
    });
  }

  /** The first line, from the given position on, that the predicate accepts. */
  async next(predicate: (line: Json) => boolean, from = 0, timeoutMs = 5000): Promise<Json> {
    const deadline = Date.now() + patient(timeoutMs);
    for (;;) {
      const found = this.lines.slice(from).find(predicate);
      if (found) return found;
      const left = deadline - Date.now();
      if (left <= 0) throw new Error(`no such line in ${timeoutMs} ms; there were ${JSON.stringify(this.lines)}`);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#waiting.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
  }

  async stop(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const gone = new Promise((resolve) => this.process.once('exit', resolve));
    this.process.kill('SIGKILL');
    await gone;
  }
}

export class LabPod {
  readonly netns: string;
  readonly path: string;
  readonly pod: CapturePod;
  readonly #lab: CaptureLab;

  constructor(lab: CaptureLab, name: string, ip4: string, ip6: string) {
    this.#lab = lab;
    this.netns = lab.addNamespace(name, ip4, ip6);
    this.path = `/var/run/netns/${this.netns}`;
    this.pod = { uid: `uid-${name}`, netnsFd: openNetns(this.path), addresses: [ip4, ip6], bypassInbound: false };
  }

  argv(...argv: string[]): string[] {
    return ['nsenter', `--net=${this.path}`, this.#lab.peer, ...argv];
  }

  /** Runs a peer to its end and returns its last line. */
  run(...argv: string[]): Json {
    const [command, ...rest] = this.argv(...argv);
    const { stdout, stderr } = spawnSync(command as string, rest, { encoding: 'utf8', timeout: patient(20_000) });
    const last = stdout.trim().split('\n').at(-1);
    if (!last) throw new Error(`${argv.join(' ')} said nothing: ${stderr}`);
    return JSON.parse(last) as Json;
  }

  connect(address: string, port: number, ...options: string[]): Json {
    return this.run('connect', address, `${port}`, ...options);
  }

  start(...argv: string[]): Peer {
    return this.#lab.keep(new Peer(this.argv(...argv)));
  }

  async serve(address: string, port: number, reusePort = false): Promise<Peer> {
    const peer = this.start('serve', address, `${port}`, ...(reusePort ? ['reuseport'] : []));
    await peer.next((line) => line.ready === true);
    return peer;
  }
}

export class CaptureLab {
  readonly directory = mkdtempSync(join(tmpdir(), 'ebA-'));
  readonly peer = COMPILED || join(this.directory, 'peer');
  readonly bridge: string;
  readonly #prefix: string;
  readonly #peers: Peer[] = [];
  readonly #pods: LabPod[] = [];
  readonly #captures: Capture[] = [];
  readonly #namespaces: string[] = [];
  readonly #mounts = new Set<string>();

  constructor() {
    this.#prefix = `ebA${process.pid}`;
    this.bridge = `${this.#prefix}br`;
    try {
      if (COMPILED === '') run(...buildPeerCommand(this.peer));
      ipBatch([`link add ${this.bridge} type bridge`, `link set ${this.bridge} up`]);
      this.addNamespace('out', OUTSIDE.ip4, OUTSIDE.ip6);
    } catch (error) {
      this.#removeGround();
      throw error;
    }
  }

  /** The other end of a namespace's eth0, where a pod's guard is. */
  hostSide(name: string): string {
    return `${this.#prefix}${name}`;
  }

  /** The filters at the host side of a pod, where a guard by clsact is one. */
  guardFilters(name: string): string {
    return run('tc', 'filter', 'show', 'dev', this.hostSide(name), 'ingress');
  }

  /** A namespace with eth0 whose other end is on the bridge. */
  addNamespace(name: string, ip4: string, ip6: string): string {
    const netns = `ebA-${process.pid}-${name}`;
    const host = this.hostSide(name);
    this.#namespaces.push(netns);
    ipBatch([
      `netns add ${netns}`,
      `link add ${host} type veth peer name eth0 netns ${netns}`,
      `link set ${host} master ${this.bridge} up`,
    ]);
    ipBatch(
      ['link set lo up', 'link set eth0 up', `address add ${ip4}/24 dev eth0`, `address add ${ip6}/64 dev eth0 nodad`],
      ...['-n', netns],
    );
    return netns;
  }

  addPod(name: string, ip4: string, ip6: string): LabPod {
    const pod = new LabPod(this, name, ip4, ip6);
    this.#pods.push(pod);
    return pod;
  }

  removePod(pod: LabPod): void {
    closeFd(pod.pod.netnsFd);
    this.#pods.splice(this.#pods.indexOf(pod), 1);
    this.#namespaces.splice(this.#namespaces.indexOf(pod.netns), 1);
    run('ip', 'netns', 'delete', pod.netns);
  }

  /** A command for the outside host. */
  outside(...argv: string[]): string[] {
    return ['nsenter', `--net=/var/run/netns/ebA-${process.pid}-out`, this.peer, ...argv];
  }

  /** Runs a peer on the outside host to its end and returns its last line. */
  runOutside(...argv: string[]): Json {
    const [command, ...rest] = this.outside(...argv);
    const { stdout } = spawnSync(command as string, rest, { encoding: 'utf8', timeout: patient(20_000) });
    return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as Json;
  }

  /** The same in the test's own namespace, which is the node's. */
  runHere(...argv: string[]): Json {
    const { stdout } = spawnSync(this.peer, argv, { encoding: 'utf8', timeout: patient(20_000) });
    return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as Json;
  }

  async startOutside(...argv: string[]): Promise<Peer> {
    const peer = this.keep(new Peer(this.outside(...argv)));
    await peer.next((line) => line.ready === true);
    return peer;
  }

  keep(peer: Peer): Peer {
    this.#peers.push(peer);
    return peer;
  }

  pinDirectory(agent: string): string {
    const mount = join(this.directory, 'bpf');
    this.#mounts.add(mount);
    return join(mount, agent);
  }

  /** Makes the test's own namespace a host on the bridge, as a node is to its pods. */
  addNodeAddresses(): void {
    ipBatch([`address add ${NODE.ip4}/24 dev ${this.bridge}`, `address add ${NODE.ip6}/64 dev ${this.bridge} nodad`]);
  }

  /** A stand-in for the kubelet, in the test's own namespace; trusted by nobody yet. */
  async startProber(): Promise<Peer> {
    const prober = this.keep(new Peer([this.peer, 'prober']));
    await prober.next((line) => line.ready === true);
    return prober;
  }

  open(agent = 'agent', extra: { classicGuard?: boolean; hold?: HoldOptions } = {}): Capture {
    const capture = openCapture({ cgroup: cgroupRoot(), pinDirectory: this.pinDirectory(agent), ...extra });
    this.#captures.push(capture);
    return capture;
  }

  /** The stand-in's listeners in a pod, trusted by the agent that has prepared the pod. */
  async startProxy(capture: Capture, pod: LabPod, workers = 2, any = '::'): Promise<Peer> {
    // Stopped before its first instruction, so that it is trusted before it binds.
    const script = 'read -r _; exec "$@"';
    const proxy = this.keep(new Peer(['sh', '-c', script, 'sh', this.peer, 'proxy', pod.path, `${workers}`, any]));
    capture.trustProxy(proxy.process.pid as number);
    proxy.process.stdin?.write('go\n');
    await proxy.next((line) => 'ready' in line);
    return proxy;
  }

  /** Everything away, also after a failure. */
  async remove(): Promise<void> {
    for (const peer of this.#peers) await peer.stop();
    try {
      for (const capture of this.#captures) capture.close({ remove: true });
    } finally {
      for (const pod of this.#pods) closeFd(pod.pod.netnsFd);
      this.#removeGround();
    }
  }

  /** Also what was only half made. */
  #removeGround(): void {
    // Links first: a namespace, and what is in it, may live on for a moment.
    const lines = this.#namespaces.flatMap((netns) => [
      `link delete ${this.hostSide(netns.split('-').at(-1) ?? '')}`,
      `netns delete ${netns}`,
    ]);
    spawnSync('ip', ['-force', '-batch', '-'], { input: [...lines, `link delete ${this.bridge}\n`].join('\n') });
    for (const mount of this.#mounts) if (existsSync(mount)) spawnSync('umount', [mount]);
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Ids of everything BPF in the kernel by kind, to compare before with after. */
export function bpfObjects(): Record<string, number[]> {
  const result: Record<string, number[]> = {};
  for (const kind of ['prog', 'link', 'map']) {
    const list = JSON.parse(run('bpftool', '-j', kind, 'list')) as { id: number; name?: string }[];
    result[kind] = list.filter((each) => kind === 'link' || (each.name ?? '').startsWith('ebb_')).map(({ id }) => id);
  }
  return result;
}

/** A cgroup of the test's own; returns its directory. */
export function makeCgroup(name: string): string {
  const directory = join(cgroupRoot(), name);
  mkdirSync(directory, { recursive: true });
  return directory;
}

/** Removes such a cgroup with all below it; processes that are still in it go to the root. */
export function removeCgroup(name: string): void {
  const directory = join(cgroupRoot(), name);
  if (!existsSync(directory)) return;
  for (const entry of readdirSync(directory, { withFileTypes: true }))
    if (entry.isDirectory()) removeCgroup(join(name, entry.name));
  for (const pid of readFileSync(join(directory, 'cgroup.procs'), 'utf8').split('\n'))
    if (pid) spawnSync('sh', ['-c', `echo ${pid} > ${cgroupRoot()}/cgroup.procs`]);
  rmdirSync(directory);
}
