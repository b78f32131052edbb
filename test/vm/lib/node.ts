/** A guest as a node of a cluster: the same processes, pods and manifests as in a lab on one machine, by commands in the guest. */
import { randomUUID } from 'node:crypto';
import { posix } from 'node:path';
import { stringify } from 'yaml';
import type { Finished } from '../../../src/lab/exec.ts';
import type { Manifest } from '../../../src/lab/manifests.ts';
import { ManifestFolder, podManifest } from '../../../src/lab/manifests.ts';
import { controlPlaneEnv, type Metric, parseMetrics } from '../../../src/lab/mesh.ts';
import {
  type Addresses,
  networkSysctls,
  nodeAddresses,
  podAddresses,
  podScript,
  wireEnd,
} from '../../../src/lab/network.ts';
import { type Place, placed } from '../../../src/lab/process.ts';
import { waitFor } from '../../../src/lab/wait.ts';
import { CONTROLLER_PORT, METRICS_PORT, READINESS_PORT } from '../../../src/mesh/ports.ts';
import { clientArgv, PORT } from '../../lib/peers.ts';
import type { Guest, GuestRunOptions } from './guest.ts';
import type { GuestProcess } from './guest-process.ts';

/** On the state disk, so that a node that lost power finds its manifests, token and root again. */
const DIRECTORY = '/state/ebbtide';
const MANIFESTS = `${DIRECTORY}/manifests`;
const LOGS = `${DIRECTORY}/logs`;
const SOCKET = '/run/ebbtide-zds.sock';
const SERVER = '/ebbtide/test/lib/programs/server.py';
const CLIENT = '/ebbtide/test/lib/programs/client.py';
const EBBTIDE = ['node', '/ebbtide/dist/main.js'];
/** Of software emulation on a busy machine. */
const SLOW_MS = 180_000;
/** The interface that is the wire. */
export const WIRE_DEVICE = 'eth0';

/** Which addresses nodes and pods have. */
export type Families = 'both' | 'only6';

/** What a pod in a guest is; {@link VmNode.run} it into being, again after each boot. */
export interface VmPod {
  readonly name: string;
  readonly namespace: string;
  readonly uid: string;
  /** Number among all pods of both nodes: makes its addresses. */
  readonly n: number;
  readonly addresses: Addresses;
  readonly identity: string;
  readonly place: Place;
  readonly node: VmNode;
  readonly manifest: Manifest;
}

export class VmNode {
  readonly guest: Guest;
  readonly number: 1 | 2;
  readonly families: Families;
  agent: GuestProcess | undefined;
  proxy: GuestProcess | undefined;
  controller: GuestProcess | undefined;

  constructor(guest: Guest, number: 1 | 2, families: Families = 'both') {
    this.guest = guest;
    this.number = number;
    this.families = families;
  }

  get name(): string {
    return `node${this.number}`;
  }

  get addresses(): Addresses {
    return nodeAddresses(this.number);
  }

  /** Address and port of the controller, which is on node 1. */
  get controllerAddress(): string {
    const { v4, v6 } = nodeAddresses(1);
    return `${this.families === 'both' ? v4 : `[${v6}]`}:${CONTROLLER_PORT}`;
  }

  /** What is needed after each boot: directories, addresses, the way to the other node. */
  async setUp(): Promise<void> {
    await this.guest.must(['mkdir', '-p', MANIFESTS, `${DIRECTORY}/staging`, `${DIRECTORY}/node`, LOGS]);
    const lines = wireEnd(this.number, WIRE_DEVICE).filter((line) => this.#wants(line));
    await this.guest.must(`${networkSysctls(true)} && ip -batch -`, { input: `link set lo up\n${lines.join('\n')}\n` });
  }

  /** A pod of this node, which does not exist yet. */
  describePod(name: string, namespace: string, n: number): VmPod {
    const uid = randomUUID();
    const both = podAddresses(this.number, n);
    const id = `${namespace}-${name}`;
    const netns = `/run/netns/${id}`;
    const manifest = podManifest({
      name,
      namespace,
      uid,
      serviceAccount: name,
      node: this.name,
      addresses: both,
      nodeAddresses: this.addresses,
      netns,
      labels: { app: name },
    });
    return {
      name,
      namespace,
      uid,
      n,
      addresses: both,
      identity: `spiffe://cluster.local/ns/${namespace}/sa/${name}`,
      // As kubelet names it with the driver cgroupfs.
      place: { netns, cgroup: `/sys/fs/cgroup/kubepods/pod${uid}` },
      node: this,
      manifest: this.families === 'both' ? manifest : onlyIp6(manifest, both.v6, this.addresses.v6),
    };
  }

  /** Makes cgroup and network namespace of a pod and links it, as a kubelet and a CNI plugin would. */
  async makePod({ place, n }: VmPod): Promise<void> {
    const script = podScript(place.netns, this.number, n, (line) => this.#wants(line));
    await this.guest.must(`set -e\nmkdir -p ${place.cgroup}\n${script}`);
  }

  /** Writes an object into the node's folder; it appears whole or not at all. */
  async write(manifest: Manifest): Promise<void> {
    const file = new ManifestFolder(MANIFESTS, '').file(manifest);
    const staged = `${DIRECTORY}/staging/${posix.basename(file)}`;
    await this.guest.must(['sh', '-c', 'cat >"$1" && sync "$1" && mv "$1" "$2"', 'sh', staged, file], {
      input: stringify(manifest),
    });
  }

  async remove(manifest: Manifest): Promise<void> {
    await this.guest.must(['rm', new ManifestFolder(MANIFESTS, '').file(manifest)]);
  }

  /** Starts the controller; resolves when it listens. */
  async startController(...flags: readonly string[]): Promise<void> {
    const argv = ['controller', '--manifests', MANIFESTS, '--data', `${DIRECTORY}/data`];
    this.controller = this.#start('controller', [...argv, '--listen', this.controllerAddress, ...flags]);
    await this.#until('the controller to listen', `ss -Hltn 'sport = :${CONTROLLER_PORT}' | grep -q .`, 'controller');
  }

  /** Text of a file that the controller keeps for its nodes. */
  controllerFile(name: string): Promise<string> {
    return this.guest.must(['cat', `${DIRECTORY}/data/${name}`]);
  }

  /** Puts root and token, as the controller made them, where this node's proxy reads them. */
  async admit(controller: VmNode): Promise<void> {
    for (const [from, to] of [
      ['root-cert.pem', 'root.pem'],
      [`tokens/${this.name}`, 'token'],
    ] as const) {
      const path = `${DIRECTORY}/node/${to}`;
      await this.guest.must(['sh', '-c', 'cat >"$1" && sync "$1"', 'sh', path], {
        input: await controller.controllerFile(from),
      });
    }
  }

  startAgent(...flags: readonly string[]): void {
    const env = { NODE_NAME: this.name, INPOD_UDS: SOCKET };
    this.agent = this.#start('agent', ['agent', '--manifests', MANIFESTS, ...flags], env);
  }

  /** Environment by which the controller is reached. */
  get controlPlane(): Readonly<Record<string, string>> {
    return controlPlaneEnv(
      `https://${this.controllerAddress}`,
      `${DIRECTORY}/node/root.pem`,
      `${DIRECTORY}/node/token`,
    );
  }

  startProxy(): void {
    this.proxy = this.#start('proxy', ['proxy'], { NODE_NAME: this.name, INPOD_UDS: SOCKET, ...this.controlPlane });
  }

  /** Resolves when the proxy says that it is ready. */
  async ready(): Promise<void> {
    await this.#until(
      'the proxy to be ready',
      `curl -sf http://127.0.0.1:${READINESS_PORT}/healthz/ready`,
      'proxy',
      'agent',
    );
  }

  async metrics(): Promise<Metric[]> {
    return parseMetrics(await this.guest.must(['curl', '-sS', '--fail', `http://127.0.0.1:${METRICS_PORT}/metrics`]));
  }

  /** Runs `ebbtide` with the node's environment. */
  ebbtide(argv: readonly string[], options: GuestRunOptions = {}): Promise<Finished> {
    const env = { NODE_NAME: this.name, INPOD_UDS: SOCKET, ...options.env };
    return this.guest.run([...EBBTIDE, ...argv], { timeoutMs: SLOW_MS, ...options, env });
  }

  /** The log of one of the node's processes, or of a program in a pod. */
  async log(name: string): Promise<string> {
    return (await this.guest.run(['cat', `${LOGS}/${name}.log`])).stdout;
  }

  /** The ends of all logs, for messages. */
  async logs(): Promise<string> {
    const { stdout } = await this.guest.run(
      `cd ${LOGS} && for each in *.log; do echo "--- $each"; tail -n 15 "$each"; done`,
    );
    return `${this.name}:\n${stdout}`;
  }

  /** Runs a command in a pod to its end. */
  run(pod: VmPod, argv: readonly string[], options?: GuestRunOptions): Promise<Finished> {
    return this.guest.run(placed(pod.place, argv), options);
  }

  /** Starts a program in a pod; what it says is in the log of that name. */
  start(pod: VmPod, name: string, argv: readonly string[]): GuestProcess {
    return this.#logged(name, placed(pod.place, argv));
  }

  /** Starts the test server in a pod; resolves when it listens. */
  async startServer(pod: VmPod): Promise<GuestProcess> {
    const server = this.start(pod, `server-${pod.name}`, ['python3', SERVER]);
    const all = [PORT.whoami, PORT.stall].map((port) => `ss -Hltn 'sport = :${port}' | grep -q .`).join(' && ');
    const check = placed(pod.place, ['sh', '-c', all]).map(quote).join(' ');
    await this.#until(`the server in ${pod.name} to listen`, check, `server-${pod.name}`);
    return server;
  }

  /** Runs a test client in a pod. @returns what it reports @throws Error with what it said, when it failed */
  async client(
    pod: VmPod,
    command: string,
    host: string,
    port: number,
    argument?: string | number,
  ): Promise<ClientReport> {
    const result = await this.run(pod, clientArgv(command, host, port, argument, CLIENT), { timeoutMs: SLOW_MS });
    if (result.code === 0) return JSON.parse(result.stdout) as ClientReport;
    const last = result.stderr.trim().split('\n').at(-1) ?? '';
    throw new Error(`${command} from ${pod.name} to ${host} port ${port} failed (${result.code}): ${last}`);
  }

  /** A test client that runs beside the test; `report` has what it reports at its end. */
  background(pod: VmPod, command: string, host: string, port: number, argument?: string | number): BackgroundClient {
    const process = this.guest.start(placed(pod.place, clientArgv(command, host, port, argument, CLIENT)));
    const report = process.ended.then((code) => {
      if (code === 0) return JSON.parse(process.stdout) as ClientReport;
      throw new Error(`${command} from ${pod.name} ended with ${code}: ${process.stderr.slice(-1000)}`);
    });
    report.catch(() => {});
    return { process, report };
  }

  #start(name: string, argv: readonly string[], env: Readonly<Record<string, string>> = {}): GuestProcess {
    return this.#logged(name, [...EBBTIDE, ...argv], env);
  }

  #logged(name: string, argv: readonly string[], env: Readonly<Record<string, string>> = {}): GuestProcess {
    return this.guest.start(['sh', '-c', 'exec "$@" >>"$0" 2>&1', `${LOGS}/${name}.log`, ...argv], { env });
  }

  async #until(what: string, script: string, ...logs: readonly string[]): Promise<void> {
    let tail = '';
    await waitFor(
      what,
      async () => {
        if ((await this.guest.run(script)).code === 0) return true;
        tail = (await Promise.all(logs.map((name) => this.log(name)))).map((log) => log.slice(-3000)).join('\n');
        return false;
      },
      { timeoutMs: SLOW_MS, intervalMs: 300, hint: () => tail },
    );
  }

  #wants(line: string): boolean {
    return this.families === 'both' || !/\d+\.\d+\.\d+\.\d+/.test(line);
  }
}

/** What a test client reports (test/lib/programs/client.py). */
export type ClientReport = Readonly<Record<string, unknown>>;

export interface BackgroundClient {
  readonly process: GuestProcess;
  readonly report: Promise<ClientReport>;
}

function onlyIp6(manifest: Manifest, pod: string, node: string): Manifest {
  const status = manifest.status as object;
  return { ...manifest, status: { ...status, podIP: pod, podIPs: [{ ip: pod }], hostIP: node } };
}

/** Whether one end of a connection on the wire, as the analysis of a recording names it, is one of the pods'. */
export function isOf(pods: readonly VmPod[], ...ends: readonly string[]): boolean {
  const names = pods.flatMap(({ addresses: { v4, v6 } }) => {
    const [prefix = '', host = ''] = v6.split('::');
    const groups = [...prefix.split(':'), ...Array<string>(8).fill('0')].slice(0, 7).concat(host);
    return [`${v4}:`, `[${groups.map((each) => each.padStart(4, '0')).join(':')}]:`];
  });
  return ends.some((end) => names.some((name) => end.startsWith(name)));
}

function quote(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
