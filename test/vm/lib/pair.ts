/** Two guests as two nodes of one cluster, joined by a wire that qemu records from the first boot to the power-off. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Manifest, namespaceManifest, nodeManifest } from '../../../src/lab/manifests.ts';
import { chosenKernel } from './chosen.ts';
import { type GuestOptions, startGuest } from './guest.ts';
import { type Families, VmNode, type VmPod } from './node.ts';
import { Wire } from './wire.ts';

export interface PairOptions {
  readonly families?: Families;
  /** Of both guests; the second has one processor and 512 MB of memory in any case. */
  readonly guests?: Partial<GuestOptions>;
  readonly first?: Partial<GuestOptions>;
  readonly second?: Partial<GuestOptions>;
}

export class Pair {
  readonly nodes: readonly [VmNode, VmNode];
  /** What passed the wire, in libpcap's format. */
  readonly recording: string;
  readonly #files: string;
  readonly #wire: Wire;
  #pods = 0;

  private constructor(nodes: readonly [VmNode, VmNode], files: string, wire: Wire) {
    this.nodes = nodes;
    this.#files = files;
    this.recording = join(files, 'wire.pcap');
    this.#wire = wire;
  }

  /** Boots both. A pair must be closed, also after a failure. */
  static async boot({ families = 'both', guests, first, second }: PairOptions = {}): Promise<Pair> {
    const files = mkdtempSync(join(tmpdir(), 'ebbtide-pair-'));
    const wire = new Wire();
    const common = { kernel: chosenKernel(), state: true, ...guests };
    const record = join(files, 'wire.pcap');
    const starting = [
      startGuest({ ...common, hostname: 'node1', networks: [{ wire, record }], memoryMb: 1024, cpus: 2, ...first }),
      startGuest({ ...common, hostname: 'node2', networks: [{ wire }], memoryMb: 512, cpus: 1, ...second }),
    ];
    const started = await Promise.allSettled(starting);
    const guests_ = started.flatMap((each) => (each.status === 'fulfilled' ? [each.value] : []));
    const [one, two] = guests_;
    if (one === undefined || two === undefined) {
      for (const guest of guests_) await guest.dispose();
      wire.dispose();
      rmSync(files, { recursive: true });
      throw started.find((each) => each.status === 'rejected')?.reason;
    }
    const pair = new Pair([new VmNode(one, 1, families), new VmNode(two, 2, families)], files, wire);
    try {
      await Promise.all(pair.nodes.map((node) => node.setUp()));
      await pair.write(...pair.nodes.map((node) => pair.#nodeManifest(node)));
    } catch (error) {
      await pair.close();
      throw error;
    }
    return pair;
  }

  get first(): VmNode {
    return this.nodes[0];
  }

  get second(): VmNode {
    return this.nodes[1];
  }

  /** Writes objects on both nodes. */
  async write(...manifests: readonly Manifest[]): Promise<void> {
    for (const manifest of manifests) await Promise.all(this.nodes.map((node) => node.write(manifest)));
  }

  async remove(...manifests: readonly Manifest[]): Promise<void> {
    for (const manifest of manifests) await Promise.all(this.nodes.map((node) => node.remove(manifest)));
  }

  namespace(name: string, mesh: boolean): Promise<void> {
    return this.write(namespaceManifest(name, mesh));
  }

  /** Makes a pod and tells both nodes of it. */
  async pod(node: VmNode, name: string, namespace: string): Promise<VmPod> {
    const pod = node.describePod(name, namespace, ++this.#pods);
    await node.makePod(pod);
    await this.write(pod.manifest);
    return pod;
  }

  /** Starts controller, agents and proxies; resolves when both proxies are ready. */
  async startMesh(agentFlags: readonly string[] = [], controllerFlags: readonly string[] = []): Promise<void> {
    await this.first.startController(...controllerFlags);
    for (const node of this.nodes) {
      await node.admit(this.first);
      node.startAgent(...agentFlags);
      node.startProxy();
    }
    await Promise.all(this.nodes.map((node) => node.ready()));
  }

  /** Ends of all logs of both, for messages. */
  async logs(): Promise<string> {
    return (await Promise.all(this.nodes.map((node) => node.logs()))).join('\n');
  }

  /** Cuts the power of both: nothing is sent any more, the recording is whole. */
  async powerOff(): Promise<void> {
    await Promise.all(this.nodes.map((node) => node.guest.powerOff()));
  }

  async close(): Promise<void> {
    for (const node of this.nodes) await node.guest.dispose();
    this.#wire.dispose();
    rmSync(this.#files, { recursive: true, force: true });
  }

  #nodeManifest(node: VmNode): Manifest {
    const both = nodeManifest(node.name, node.addresses);
    if (node.families === 'both') return both;
    return { ...both, status: { addresses: [{ type: 'InternalIP', address: node.addresses.v6 }] } };
  }
}
