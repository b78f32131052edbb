/**
 * A Kubernetes node without a kubelet: its pods are made by hand as the kubelet and a runtime would make them, of real network
 * namespaces, processes and cgroups, and their objects are real ones on a real API server.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Api } from '../../../src/mesh/api/index.js';
import { CaptureLab, cgroupRoot, type Json, type LabPod } from '../../datapath/capture/lab.ts';

export interface BarePodOptions {
  readonly name: string;
  readonly namespace: string;
  /** Last part of its addresses, 10 to 200. */
  readonly number: number;
  readonly labels?: Readonly<Record<string, string>>;
  readonly annotations?: Readonly<Record<string, string>>;
  readonly hostNetwork?: boolean;
  /** How the kubelet's driver names the cgroup. */
  readonly driver?: 'cgroupfs' | 'systemd';
}

interface PodObject {
  readonly metadata: {
    readonly uid: string;
    readonly annotations?: Readonly<Record<string, string>>;
  };
}

/** A pod: an object, and once `run` was called a namespace with a process in a cgroup. */
export class BarePod {
  readonly name: string;
  readonly namespace: string;
  readonly uid: string;
  readonly addresses: readonly [string, string];
  readonly #node: BareNode;
  readonly #options: BarePodOptions;
  lab: LabPod | undefined;
  #process: ChildProcess | undefined;
  #cgroup = '';

  constructor(node: BareNode, options: BarePodOptions, uid: string) {
    this.#node = node;
    this.#options = options;
    this.name = options.name;
    this.namespace = options.namespace;
    this.uid = uid;
    this.addresses = [`10.231.0.${options.number}`, `fd31::${options.number.toString(16)}`];
  }

  get path(): string {
    return `/api/v1/namespaces/${this.namespace}/pods/${this.name}`;
  }

  /** Makes the pod's network, as a CNI plugin would. */
  makeNetwork(): LabPod {
    const { number } = this.#options;
    // Interface names are short, and a pod may be made again under the same number.
    this.lab = this.#node.lab.addPod(this.#node.shortName(number), ...this.addresses);
    return this.lab;
  }

  /** Starts a process in the pod's namespace and cgroup, as a runtime would. */
  async startProcess(): Promise<void> {
    const { lab } = this;
    if (lab === undefined) throw new Error('the pod has no network yet');
    const slice = this.uid.replaceAll('-', '_');
    const id = randomUUID().replaceAll('-', '');
    this.#cgroup =
      this.#options.driver === 'systemd'
        ? join(`kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod${slice}.slice`, `crio-${id}.scope`)
        : join(`kubepods/besteffort/pod${this.uid}`, id);
    const cgroup = join(this.#node.cgroup, this.#cgroup);
    mkdirSync(cgroup, { recursive: true });
    // In its cgroup before it is in its namespace, as runc has it.
    const script = 'echo $$ > "$1/cgroup.procs"; exec nsenter --net="$2" sleep 1000000';
    this.#process = spawn('sh', ['-c', script, 'sh', cgroup, lab.path], { stdio: 'ignore' });
    await this.#node.settled(this.#process);
  }

  /** Runs a peer to its end in the pod's namespace and cgroup; returns its last line. */
  runInside(...argv: string[]): Json {
    const { lab } = this;
    if (lab === undefined || this.#cgroup === '') throw new Error('no process of the pod was started');
    const script = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"';
    const cgroup = join(this.#node.cgroup, this.#cgroup);
    const { stdout, stderr } = spawnSync('sh', ['-c', script, 'sh', cgroup, ...lab.argv(...argv)], {
      encoding: 'utf8',
      timeout: 30_000,
    });
    const last = stdout.trim().split('\n').at(-1);
    if (!last) throw new Error(`${argv.join(' ')} said nothing: ${stderr}`);
    return JSON.parse(last) as Json;
  }

  /** Says on the API that the pod runs and which addresses it has. */
  async reportRunning(phase = 'Running'): Promise<void> {
    const [podIP] = this.addresses;
    const status = { phase, podIP, podIPs: this.addresses.map((ip) => ({ ip })) };
    await this.#node.api.request('PATCH', `${this.path}/status`, { body: { status } });
  }

  /** All of it. */
  async run(): Promise<this> {
    this.makeNetwork();
    await this.startProcess();
    await this.reportRunning();
    return this;
  }

  async label(labels: Readonly<Record<string, string | null>>): Promise<void> {
    await this.#node.api.request('PATCH', this.path, { body: { metadata: { labels } } });
  }

  async annotate(annotations: Readonly<Record<string, string | null>>): Promise<void> {
    await this.#node.api.request('PATCH', this.path, { body: { metadata: { annotations } } });
  }

  /** Value of annotation ambient.istio.io/redirection on the API. */
  async redirection(): Promise<string | undefined> {
    const pod = await this.#node.api.request<PodObject>('GET', this.path);
    return pod.metadata.annotations?.['ambient.istio.io/redirection'];
  }

  /** Deletes the object, and ends what runs. */
  async remove(): Promise<void> {
    await this.#node.api.request('DELETE', this.path, { body: { gracePeriodSeconds: 0 } });
    await this.end();
  }

  async end(): Promise<void> {
    const process = this.#process;
    if (process !== undefined && process.exitCode === null && process.signalCode === null) {
      const gone = new Promise((resolve) => process.once('exit', resolve));
      process.kill('SIGKILL');
      await gone;
    }
    this.#process = undefined;
    if (this.lab !== undefined) this.#node.lab.removePod(this.lab);
    this.lab = undefined;
  }
}

export class BareNode {
  readonly name: string;
  readonly api: Api;
  readonly lab: CaptureLab;
  readonly cgroup: string;
  readonly pods: BarePod[] = [];
  #serial = 0;

  private constructor(api: Api, name: string) {
    this.api = api;
    this.name = name;
    this.lab = new CaptureLab();
    this.cgroup = join(cgroupRoot(), `ebK-${process.pid}`);
    mkdirSync(this.cgroup, { recursive: true });
  }

  static async make(api: Api, name: string): Promise<BareNode> {
    sweep();
    await api.request('POST', '/api/v1/nodes', { body: { metadata: { name } } });
    return new BareNode(api, name);
  }

  shortName(number: number): string {
    return `${number.toString(36)}${(this.#serial++ % 1296).toString(36)}`;
  }

  async namespace(name: string, mode?: string): Promise<void> {
    const labels = mode === undefined ? {} : { 'istio.io/dataplane-mode': mode };
    await this.api.request('POST', '/api/v1/namespaces', { body: { metadata: { name, labels } } });
  }

  async labelNamespace(name: string, mode: string | null): Promise<void> {
    const body = { metadata: { labels: { 'istio.io/dataplane-mode': mode } } };
    await this.api.request('PATCH', `/api/v1/namespaces/${name}`, { body });
  }

  /** Makes the object, bound to this node; nothing runs yet. */
  async pod(options: BarePodOptions): Promise<BarePod> {
    const { name, namespace, labels = {}, annotations = {}, hostNetwork = false } = options;
    const body = {
      metadata: { name, labels, annotations },
      spec: {
        nodeName: this.name,
        hostNetwork,
        containers: [{ name: 'app', image: 'none', imagePullPolicy: 'Never' }],
        terminationGracePeriodSeconds: 0,
        automountServiceAccountToken: false,
      },
    };
    const made = await this.api.request<PodObject>('POST', `/api/v1/namespaces/${namespace}/pods`, { body });
    const pod = new BarePod(this, options, made.metadata.uid);
    this.pods.push(pod);
    return pod;
  }

  /** Resolves once a shell has become what it executes. */
  async settled(child: ChildProcess): Promise<void> {
    const own = `/proc/${child.pid}/comm`;
    const { readFileSync } = await import('node:fs');
    for (let tries = 0; tries < 500; tries++) {
      if (existsSync(own) && readFileSync(own, 'utf8').trim() === 'sleep') return;
      await sleep(10);
    }
    throw new Error('the process of a pod did not start');
  }

  /** Everything away, also after a failure. */
  async remove(): Promise<void> {
    for (const pod of this.pods) await pod.end();
    await this.lab.remove();
    removeCgroup(this.cgroup);
  }
}

/**
 * Removes what a run left that was killed: namespaces and cgroups named by a process that is gone. A pod's namespace is found by
 * its address as well, and those of another run have the same.
 */
function sweep(): void {
  const dead = (name: string, prefix: string): boolean => {
    const [, pid] = new RegExp(`^${prefix}-(\\d+)(-|$)`).exec(name) ?? [];
    return pid !== undefined && !existsSync(`/proc/${pid}`);
  };
  const namespaces = existsSync('/var/run/netns') ? readdirSync('/var/run/netns') : [];
  for (const name of namespaces) if (dead(name, 'ebA')) spawnSync('ip', ['netns', 'delete', name]);
  for (const name of readdirSync(cgroupRoot())) {
    if (!dead(name, 'ebK')) continue;
    const path = join(cgroupRoot(), name);
    writeFileSync(join(path, 'cgroup.kill'), '1');
    try {
      removeCgroup(path);
    } catch {
      // What was killed has not ended yet; the next run removes it.
    }
  }
}

function removeCgroup(path: string): void {
  if (!existsSync(path)) return;
  for (const entry of readdirSync(path, { withFileTypes: true })) {
    if (entry.isDirectory()) removeCgroup(join(path, entry.name));
  }
  rmdirSync(path);
}
