/** A Kubernetes cluster of two nodes on this machine: real API server, kubelets and containerd; no virtual machine. */
import { mkdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import { must } from '../../../src/lab/exec.ts';
import { cgroup1Roots, Ground, sweep } from '../../../src/lab/ground.ts';
import { CONTROL_ADDRESS, makeNodes, nodeAddresses } from '../../../src/lab/network.ts';
import { waitFor } from '../../../src/lab/wait.ts';
import { ControlPlane } from './control-plane.ts';
import { makePauseImage, makeToolsImage } from './images.ts';
import { ClusterNode } from './node.ts';

/** Tells a person what is going on while something takes long. */
export type Progress = (what: string) => void;

export class Cluster {
  readonly ground: Ground;
  readonly plane: ControlPlane;
  readonly nodes: readonly [ClusterNode, ClusterNode];

  private constructor(ground: Ground, plane: ControlPlane, nodes: readonly [ClusterNode, ClusterNode]) {
    this.ground = ground;
    this.plane = plane;
    this.nodes = nodes;
  }

  /** Brings a cluster up; resolves when both nodes are ready. What was made is removed again when that fails. */
  static async create(progress: Progress): Promise<Cluster> {
    await sweep();
    const ground = await Ground.claim();
    try {
      return await bringUp(ground, progress, (plane, nodes) => new Cluster(ground, plane, nodes));
    } catch (error) {
      await ground.remove();
      throw error;
    }
  }

  /** Runs kubectl, which must succeed. @returns its standard output */
  kubectl(argv: readonly string[], input?: string): Promise<string> {
    return this.plane.kubectlMust(argv, input);
  }

  /** Applies objects. */
  async apply(...objects: readonly object[]): Promise<void> {
    const list = { apiVersion: 'v1', kind: 'List', items: objects };
    await this.kubectl(['apply', '--server-side', '-f', '-'], JSON.stringify(list));
  }

  /** Reads one object. @throws Error where it is not there */
  async get<T>(kind: string, name: string, namespace?: string): Promise<T> {
    const where = namespace === undefined ? [] : ['-n', namespace];
    return JSON.parse(await this.kubectl(['get', kind, name, ...where, '-o', 'json'])) as T;
  }

  /** Runs a command in a container of a pod. @returns what it said */
  exec(namespace: string, pod: string, argv: readonly string[], input?: string): ReturnType<ControlPlane['kubectl']> {
    const stdin = input === undefined ? [] : ['-i'];
    return this.plane.kubectl(['exec', ...stdin, '-n', namespace, pod, '--', ...argv], input);
  }

  /** Resolves when all pods of a selector in a namespace are ready, and there is at least one. */
  async podsReady(namespace: string, selector: string, timeoutMs = 120_000): Promise<void> {
    await waitFor(
      `pods ${selector} in ${namespace} to be ready`,
      async () => {
        const text = await this.kubectl(['get', 'pods', '-n', namespace, '-l', selector, '-o', 'json']);
        const { items } = JSON.parse(text) as { items: PodJson[] };
        return items.length > 0 && items.every(isReady);
      },
      { timeoutMs, intervalMs: 300 },
    );
  }

  /** Ends everything and removes every trace. Idempotent. */
  async close(): Promise<void> {
    await this.ground.remove();
  }
}

interface PodJson {
  readonly status?: { readonly conditions?: readonly { readonly type: string; readonly status: string }[] };
}

const isReady = (pod: PodJson): boolean =>
  pod.status?.conditions?.some(({ type, status }) => type === 'Ready' && status === 'True') ?? false;

async function bringUp<T>(
  ground: Ground,
  progress: Progress,
  finish: (plane: ControlPlane, nodes: readonly [ClusterNode, ClusterNode]) => T,
): Promise<T> {
  await makeNodes(ground);
  await joinControlNetwork(ground);
  const disk = (name: string): string => {
    const path = join(ground.disk, name);
    mkdirSync(path, { recursive: true, mode: 0o700 });
    return path;
  };
  const plane = await ControlPlane.create({
    place: { netns: ground.netnsPath('control'), cgroup: ground.subgroup('control') },
    address: CONTROL_ADDRESS,
    directory: disk('control'),
    nodes: ['node1', 'node2'],
  });
  progress('starting etcd, API server, controller manager, scheduler and DNS');
  const images = Promise.all([makePauseImage(disk('pause')), makeToolsImage(disk('tools'))]);
  await plane.start();
  const [first, second] = [1, 2].map((n) => makeNode(ground, n, disk(`node${n}`), plane));
  if (first === undefined || second === undefined) throw new Error('two nodes were asked for');
  const nodes = [first, second] as const;
  progress('starting containerd on both nodes, importing images');
  const tars = await images;
  await Promise.all(nodes.map((node) => node.startRuntime()));
  for (const tar of tars) await Promise.all(nodes.map((node) => node.importImage(tar)));
  progress('starting the kubelets');
  await Promise.all(nodes.map((node) => node.startKubelet()));
  await waitFor(
    'both nodes to be ready',
    async () => {
      const { items } = JSON.parse(await plane.kubectlMust(['get', 'nodes', '-o', 'json'])) as { items: PodJson[] };
      return items.length === 2 && items.every(isReady);
    },
    { timeoutMs: 120_000, intervalMs: 500, hint: () => nodes.map(({ kubelet }) => kubelet.tail()).join('\n') },
  );
  return finish(plane, nodes);
}

function makeNode(ground: Ground, n: number, directory: string, plane: ControlPlane): ClusterNode {
  const name = `node${n}`;
  const { v4, v6 } = nodeAddresses(n);
  const cgroupRoot = `/${basename(ground.cgroup)}/${name}`;
  for (const root of cgroup1Roots()) {
    const path = join(root, cgroupRoot);
    mkdirSync(path, { recursive: true });
  }
  ground.subgroup(name);
  return new ClusterNode({
    name,
    place: { netns: ground.netnsPath(name), cgroup: ground.subgroup(`system-${name}`) },
    cgroupRoot,
    directory,
    addresses: [v4, v6],
    podRanges: [`10.244.${n}.0/24`, `fd00:244:${n}::/64`],
    plane,
  });
}

/** Pods reach the control plane through their node, and the API server reaches kubelets and pods. */
async function joinControlNetwork(ground: Ground): Promise<void> {
  const lines = [1, 2].flatMap((n) => [
    `route add 10.244.${n}.0/24 via 172.31.255.${n}`,
    `route add ${nodeAddresses(n).v4}/32 via 172.31.255.${n}`,
  ]);
  const batch = ['nsenter', `--net=${ground.netnsPath('control')}`, 'ip', '-batch', '-'];
  await must(batch, { input: `${lines.join('\n')}\n` });
  for (const n of [1, 2]) {
    const other = `route add ${CONTROL_ADDRESS}/32 dev control0 src ${nodeAddresses(n).v4}`;
    await must(['nsenter', `--net=${ground.netnsPath(`node${n}`)}`, 'ip', '-batch', '-'], { input: `${other}\n` });
  }
}
