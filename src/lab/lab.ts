/**
 * Two Kubernetes nodes on one machine: network namespaces joined by a wire, pods with real programs on them, and the mesh's
 * own processes beside. Used by the demo, the datapath tests and the benchmark. Needs root; touches nothing of the
 * machine's own network.
 */
import { randomUUID } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { type Finished, type RunOptions, run } from './exec.js';
import { Ground, sweep } from './ground.js';
import {
  type Manifest,
  ManifestFolder,
  namespaceManifest,
  nodeManifest,
  podManifest,
  serviceManifest,
} from './manifests.js';
import { MeshNode, type MeshOptions, startController } from './mesh.js';
import {
  type Addresses,
  applyServiceRules,
  makeNodes,
  makePod,
  nodeAddresses,
  podAddresses,
  SERVICE_PREFIX,
  type ServiceRule,
} from './network.js';
import { LabProcess, type Place, placed } from './process.js';
import { waitFor } from './wait.js';
import { WireRecording } from './wire.js';

export interface PodOptions {
  readonly name: string;
  readonly namespace: string;
  readonly node: 1 | 2;
  /** Default: the pod's name. */
  readonly serviceAccount?: string;
  /** Default: {app: the pod's name}. */
  readonly labels?: Readonly<Record<string, string>>;
}

/** A pod: a network namespace with eth0 and two addresses, a cgroup, and what runs in it. */
export class Pod {
  readonly name: string;
  readonly namespace: string;
  readonly node: 1 | 2;
  readonly serviceAccount: string;
  readonly addresses: Addresses;
  readonly manifest: Manifest;
  readonly place: Place;
  /** Directory for the pod's files. */
  readonly directory: string;

  constructor(ground: Ground, options: PodOptions, n: number) {
    this.name = options.name;
    this.namespace = options.namespace;
    this.node = options.node;
    this.serviceAccount = options.serviceAccount ?? options.name;
    this.addresses = podAddresses(options.node, n);
    this.place = { netns: ground.netnsPath(this.id), cgroup: ground.subgroup(`pods/${this.id}`) };
    this.directory = join(ground.directory, 'pods', this.id);
    mkdirSync(this.directory, { recursive: true });
    this.manifest = podManifest({
      name: options.name,
      namespace: options.namespace,
      uid: randomUUID(),
      serviceAccount: this.serviceAccount,
      node: `node${options.node}`,
      addresses: this.addresses,
      nodeAddresses: nodeAddresses(options.node),
      netns: this.place.netns,
      labels: options.labels ?? { app: options.name },
    });
  }

  /** Name of the pod in paths: namespace and name. */
  get id(): string {
    return `${this.namespace}-${this.name}`;
  }

  get identity(): string {
    return `spiffe://cluster.local/ns/${this.namespace}/sa/${this.serviceAccount}`;
  }

  /** Runs a command in the pod to its end. */
  run(argv: readonly string[], options?: RunOptions): Promise<Finished> {
    return run(placed(this.place, argv), options);
  }

  /** Starts a program in the pod; its output goes to a file named after it in the pod's directory. */
  start(name: string, argv: readonly string[], stdout?: string): Promise<LabProcess> {
    const log = join(this.directory, `${name}.log`);
    const options = stdout === undefined ? { log } : { log, stdout: join(this.directory, stdout) };
    return LabProcess.start(`${name} in ${this.id}`, this.place, argv, options);
  }

  /** Resolves when something in the pod listens on a TCP port. */
  async listening(port: number, by?: LabProcess): Promise<void> {
    await waitFor(
      `${this.id} to listen on port ${port}`,
      async () => {
        const sockets = await this.run(['ss', '-Hltn', `sport = :${port}`]);
        return sockets.stdout.trim() !== '';
      },
      { hint: () => (by === undefined ? '' : `${by.name}: ${by.fate}\n${by.tail()}`) },
    );
  }
}

export interface ServiceOptions {
  readonly name: string;
  readonly namespace: string;
  readonly pods: readonly Pod[];
  readonly ports: readonly { readonly port: number; readonly targetPort: number }[];
  readonly headless?: boolean;
  /** Default: {app: name of the first pod}. */
  readonly selector?: Readonly<Record<string, string>>;
}

/** A running lab. Every one made must be closed, also after a failure. */
export class Lab {
  readonly ground: Ground;
  readonly manifests: ManifestFolder;
  readonly pods: Pod[] = [];
  controller: LabProcess | undefined;
  readonly #nodes: MeshNode[] = [];
  readonly #rules: ServiceRule[] = [];
  #services = 0;

  private constructor(ground: Ground) {
    this.ground = ground;
    this.manifests = new ManifestFolder(join(ground.directory, 'manifests'), join(ground.directory, 'tmp'));
  }

  /** Makes the two nodes; first removes what crashed labs left. */
  static async create(): Promise<Lab> {
    await sweep();
    const ground = await Ground.claim();
    try {
      await makeNodes(ground);
    } catch (error) {
      await ground.remove();
      throw error;
    }
    const lab = new Lab(ground);
    for (const node of [1, 2]) lab.manifests.write(nodeManifest(`node${node}`, nodeAddresses(node)));
    return lab;
  }

  namespace(name: string, options: { readonly mesh: boolean }): void {
    this.manifests.write(namespaceManifest(name, options.mesh));
  }

  async pod(options: PodOptions): Promise<Pod> {
    const pod = new Pod(this.ground, options, this.pods.length + 1);
    this.pods.push(pod);
    await makePod(this.ground, pod.id, pod.node, this.pods.length);
    this.manifests.write(pod.manifest);
    return pod;
  }

  /** A Service over pods, with addresses of both families. Uncaptured clients reach it by the nodes' destination NAT. */
  async service(options: ServiceOptions): Promise<Addresses> {
    const n = 10 + this.#services++;
    const addresses = { v4: `${SERVICE_PREFIX.v4}${n}`, v6: `${SERVICE_PREFIX.v6}${n.toString(16)}` };
    const selector = options.selector ?? { app: options.pods[0]?.name ?? options.name };
    this.manifests.write(
      serviceManifest({ ...options, selector, addresses: options.headless ? [] : [addresses.v4, addresses.v6] }),
    );
    if (options.headless) return addresses;
    for (const { port, targetPort } of options.ports) {
      for (const family of ['v4', 'v6'] as const) {
        const targets = options.pods.map((pod) => ({ address: pod.addresses[family], port: targetPort }));
        this.#rules.push({ address: addresses[family], port, targets });
      }
    }
    await applyServiceRules(this.ground, this.#rules);
    return addresses;
  }

  node(number: 1 | 2): MeshNode {
    const node = this.#nodes[number - 1];
    if (node === undefined) throw new Error('the mesh of this lab was not started');
    return node;
  }

  get nodes(): readonly MeshNode[] {
    return this.#nodes;
  }

  /** Starts controller, agents and proxies; resolves when both proxies are ready. */
  async startMesh(options: MeshOptions = {}): Promise<void> {
    this.controller = await startController(this.ground, options);
    for (const number of [1, 2]) this.#nodes.push(new MeshNode(this.ground, number, options));
    await Promise.all(this.#nodes.map((node) => node.startAgent()));
    await Promise.all(this.#nodes.map((node) => node.startProxy()));
    await Promise.all(this.#nodes.map((node) => node.ready()));
  }

  /**
   * Stops the mesh's processes as an operator would and removes what they put into the kernel.
   * @returns what did not end cleanly, in words
   */
  async stopMesh(): Promise<string[]> {
    const problems: string[] = [];
    for (const node of this.#nodes) {
      if (!(await node.stop())) {
        const fates = [node.agent, node.proxy].map((process) => `${process?.name}: ${process?.fate}`);
        problems.push(`${node.name} did not stop cleanly (${fates.join(', ')})`);
      }
      await node.uninstall().catch((error: Error) => problems.push(`${node.name}: ${error.message}`));
    }
    this.#nodes.length = 0;
    if (this.controller !== undefined && !(await this.controller.stop()))
      problems.push('the controller had to be killed');
    this.controller = undefined;
    return problems;
  }

  /** Records the wire between the nodes. */
  recordWire(name: string, packetBytes?: number): Promise<WireRecording> {
    return WireRecording.start(this.ground, name, packetBytes);
  }

  /** Ends everything and removes every trace, whatever state the lab is in. Idempotent. */
  async close(): Promise<void> {
    await this.ground.remove();
  }
}
