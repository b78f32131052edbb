/** Ebbtide on a test cluster: its image built and imported, its chart installed by helm, and what the tests ask of it. */
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { must } from '../../../src/lab/exec.ts';
import { placed } from '../../../src/lab/process.ts';
import { waitFor } from '../../../src/lab/wait.ts';
import { binary } from './binaries.ts';
import type { Cluster, Progress } from './cluster.ts';

const CHECKOUT = fileURLToPath(new URL('../../..', import.meta.url));
export const MESH_NAMESPACE = 'ebbtide-system';
export const MESH_IMAGE = { repository: 'localhost/ebbtide', tag: 'lab' } as const;

/** Two nodes share this machine's kernel: each is told which network namespace and which pods are its own. */
const NODE_VALUES = [
  'node.hostPaths.cgroup=/run/cgroup',
  'agent.env.EBBTIDE_HOST_NETNS=/var/run/netns/node',
  'agent.env.EBBTIDE_POD_CGROUP=/host/sys/fs/cgroup/pods',
] as const;

/** Builds the image of this checkout and brings it to both nodes. */
export async function importMeshImage(cluster: Cluster): Promise<void> {
  const tar = join(cluster.ground.disk, 'ebbtide.tar');
  const { repository, tag } = MESH_IMAGE;
  await must(['bash', join(CHECKOUT, 'daemonset/image/build.sh'), '-t', `${repository}:${tag}`, '-o', tar], {
    timeoutMs: 180_000,
  });
  for (const node of cluster.nodes) await node.importImage(tar);
}

/** `helm upgrade --install`, as the README tells it, with this checkout's image. Waits until all is ready. */
export async function installMesh(cluster: Cluster, progress: Progress, set: readonly string[] = []): Promise<void> {
  progress('building and importing the image of Ebbtide');
  await importMeshImage(cluster);
  progress('helm upgrade --install');
  await helm(cluster, [
    ...['upgrade', '--install', 'ebbtide', join(CHECKOUT, 'daemonset/chart')],
    ...['--namespace', MESH_NAMESPACE, '--create-namespace', '--wait', '--timeout', '4m'],
    ...['--set', `image.repository=${MESH_IMAGE.repository},image.tag=${MESH_IMAGE.tag},image.pullPolicy=Never`],
    ...NODE_VALUES.flatMap((value) => ['--set', value]),
    ...set.flatMap((value) => ['--set', value]),
  ]);
  progress('the mesh is installed');
}

export function helm(cluster: Cluster, argv: readonly string[]): Promise<string> {
  const command = [binary('helm'), '--kubeconfig', cluster.plane.kubeconfig('admin'), ...argv];
  const place = { netns: cluster.ground.netnsPath('control'), cgroup: cluster.ground.subgroup('control') };
  return must(placed(place, command), { timeoutMs: 300_000, env: { HOME: cluster.ground.disk } });
}

interface PodObject {
  readonly metadata: {
    readonly name: string;
    readonly uid: string;
    readonly annotations?: Readonly<Record<string, string>>;
    readonly deletionTimestamp?: string;
  };
  readonly spec: { readonly nodeName?: string };
  readonly status: {
    readonly podIP?: string;
    readonly containerStatuses?: readonly {
      readonly name: string;
      readonly restartCount: number;
      readonly containerID: string;
    }[];
  };
}

/** Pods of a namespace, by label. */
export async function podsOf(cluster: Cluster, namespace: string, selector = ''): Promise<PodObject[]> {
  const where = selector === '' ? [] : ['-l', selector];
  const list = await cluster.kubectl(['get', 'pods', '-n', namespace, ...where, '-o', 'json']);
  return (JSON.parse(list) as { items: PodObject[] }).items;
}

const REDIRECTION = 'ambient.istio.io/redirection';

/** Resolves when every pod of a namespace says that it is captured, or that it is not. @returns milliseconds since the call */
export async function captured(cluster: Cluster, namespace: string, wanted: boolean): Promise<number> {
  const started = performance.now();
  await waitFor(
    `all pods of ${namespace} to be ${wanted ? 'captured' : 'let go'}`,
    async () => {
      const pods = await podsOf(cluster, namespace);
      return pods.every(({ metadata }) => (metadata.annotations?.[REDIRECTION] === 'enabled') === wanted);
    },
    { timeoutMs: 60_000, intervalMs: 50 },
  );
  return performance.now() - started;
}

/** The pod of the DaemonSet on a node, the newest where there are two. */
export async function meshPod(cluster: Cluster, node: string): Promise<PodObject> {
  const pods = await podsOf(cluster, MESH_NAMESPACE, 'app.kubernetes.io/component=node');
  const own = pods.filter(({ spec, metadata }) => spec.nodeName === node && metadata.deletionTimestamp === undefined);
  const newest = own.at(-1);
  if (newest === undefined) throw new Error(`no pod of the mesh runs on ${node}`);
  return newest;
}

/** Process id, on this machine, of a container's first process. */
export async function containerPid(cluster: Cluster, pod: PodObject, container: string): Promise<number> {
  const status = pod.status.containerStatuses?.find(({ name }) => name === container);
  const id = status?.containerID.replace('containerd://', '') ?? '';
  const node = cluster.nodes.find(({ name }) => name === pod.spec.nodeName);
  const listed = (await node?.ctr(['tasks', 'list']))?.stdout ?? '';
  const line = listed.split('\n').find((text) => text.startsWith(id));
  const pid = Number(line?.trim().split(/\s+/)[1]);
  if (!(pid > 1)) throw new Error(`no process of container ${container} of ${pod.metadata.name}: ${listed}`);
  return pid;
}
