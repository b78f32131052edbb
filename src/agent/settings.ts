/** What the agent can be told: flags and environment of `ebbtide agent`, read and judged. */
import { existsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { EXCLUDED_NAMESPACES } from '../mesh/labels.js';
import { AGENT_PORT } from '../mesh/ports.js';
import { type NodeFacts, type RawBootGuard, readBootGuard } from './boot-guard/settings.js';
import type { BootGuardOptions } from './boot-guard/units.js';
import { type HoldOptions, PIN_DIRECTORY_NAME } from './capture.js';
import type { OwnPod } from './daemonset.js';
import { checkCapabilities, checkCgroup, podsCgroup } from './machine.js';
import { provideBpffs, provideCgroupRoot } from './mounts.js';
import { DEFAULT_READY_PATIENCE_S, DEFAULT_ZDS_SOCKET, type RawOptions } from './options.js';
import type { ProxyNetns } from './proxy-place.js';

export interface AgentSettings {
  /** The node whose pods this agent enrols, as `spec.nodeName` has it. */
  readonly nodeName: string;
  /** Folder of Kubernetes manifests, watched; undefined: the Kubernetes API is. */
  readonly manifests: string | undefined;
  /** Path of a kubeconfig; undefined: this is a pod with a service account. */
  readonly kubeconfig: string | undefined;
  /** The pod that the agent is; undefined where it is none. */
  readonly ownPod: OwnPod | undefined;
  /** Path of the root certificates for the proxy in the same pod; undefined: nobody waits for them. */
  readonly rootCert: string | undefined;
  /** Namespaces whose pods are never captured. */
  readonly excludedNamespaces: readonly string[];
  /** The node's /proc, of its pid namespace. */
  readonly hostProc: string;
  /** Path of the node's network namespace; undefined: the kubelet's. */
  readonly hostNetns: string | undefined;
  /** Port by which the kubelet is known. */
  readonly kubeletPort: number;
  /** What becomes of new pods until they are decided about and captured; undefined: none is held. */
  readonly hold: HoldOptions | undefined;
  /** Guard pods' veths by clsact, also where the kernel has tcx. */
  readonly classicGuard: boolean;
  /** Where the container runtime mounts network namespaces. */
  readonly cniNetns: string;
  /** Path of the ZDS socket. */
  readonly zdsSocket: string;
  /** Path of the socket on which the agent tells its status over HTTP. */
  readonly statusSocket: string;
  /** Port of metrics and readiness; undefined: none, 0: the kernel chooses. */
  readonly port: number | undefined;
  /** How long a pod that cannot be enrolled keeps the agent from being ready, in milliseconds. */
  readonly readyPatienceMs: number;
  /** Directory of cgroup2 whose processes are captured. */
  readonly cgroup: string;
  /** Where the bpffs is; a path of this process where it is outside of its mount namespace. */
  readonly bpffs: string;
  /** The agent mounted it. */
  readonly bpffsMounted: boolean;
  /** Directory of the agent's pins. */
  readonly pinDirectory: string;
  /** Network namespaces in which a proxy may run. */
  readonly proxyNetns: ProxyNetns;
  /** Ask the agent that has this node for it, and give it to the next that asks. */
  readonly takeOver: boolean;
  /** Installs the boot guard below this root of the node, like this; undefined: does not. */
  readonly bootGuard: { readonly root: string; readonly options: BootGuardOptions } | undefined;
  /** At the end leave all pods captured, for the agent that comes next; undefined: unless the DaemonSet is deleted. */
  readonly keep: boolean | undefined;
}

/** Path of the status socket that belongs to a ZDS socket. */
export const statusSocketOf = (zdsSocket: string): string => `${zdsSocket}.status`;

/** The ZDS socket's path by the environment. */
export const zdsSocketOf = (env: NodeJS.ProcessEnv): string => env.INPOD_UDS || DEFAULT_ZDS_SOCKET;

/** Pin directory of a node's agent: several agents may share a bpffs. A bpffs refuses dots, and no node has underscores. */
export function pinDirectoryOf(bpffs: string, nodeName: string): string {
  return join(bpffs, `${PIN_DIRECTORY_NAME}-${nodeName.replaceAll('.', '_')}`);
}

/**
 * Reads what {@link addOptions} declared, and looks whether this machine can do it.
 * @throws Error that says what is missing and what to do
 */
export function readSettings(options: RawOptions, env: NodeJS.ProcessEnv = process.env): AgentSettings {
  const nodeName = env.NODE_NAME ?? '';
  if (!/^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$/.test(nodeName)) {
    const what = nodeName === '' ? 'is not set' : `is ${JSON.stringify(nodeName)}, which is no name of a Node`;
    throw new Error(`NODE_NAME ${what}; set it to the name of this node as in spec.nodeName of its pods`);
  }
  const cluster = clusterSettings(options, env);
  checkCapabilities();
  const cgroup = options.cgroup === undefined ? provideCgroupRoot() : resolve(options.cgroup);
  checkCgroup(cgroup);
  const bpffs = resolve(options.bpffs);
  const found = provideBpffs(bpffs);
  const zdsSocket = zdsSocketOf(env);
  const hold = cluster.hold === undefined ? undefined : { ...ownPodsOnly(cgroup), ...cluster.hold };
  return {
    ...cluster,
    hold,
    bootGuard: bootGuardOf(options, hold, {
      nodeName,
      bpffs,
      runDirectory: dirname(zdsSocket),
      ownPod: cluster.ownPod,
    }),
    nodeName,
    zdsSocket,
    statusSocket: statusSocketOf(zdsSocket),
    cgroup,
    bpffs: found.path,
    bpffsMounted: found.mounted,
    pinDirectory: pinDirectoryOf(found.path, nodeName),
    proxyNetns: options.proxyNetns,
  };
}

type ClusterSettings = Pick<
  AgentSettings,
  | 'manifests'
  | 'kubeconfig'
  | 'ownPod'
  | 'rootCert'
  | 'excludedNamespaces'
  | 'hostProc'
  | 'cniNetns'
  | 'hostNetns'
  | 'kubeletPort'
  | 'hold'
  | 'classicGuard'
  | 'port'
  | 'readyPatienceMs'
  | 'takeOver'
  | 'keep'
>;

/** What depends on whether there is a cluster, and asks nothing of the machine. @throws Error */
export function clusterSettings(
  options: Omit<RawOptions, keyof RawBootGuard>,
  env: NodeJS.ProcessEnv,
): ClusterSettings {
  const manifests = options.manifests || undefined;
  const kubeconfig = options.kubeconfig || undefined;
  const byApi = manifests === undefined;
  if (!byApi && kubeconfig !== undefined) {
    throw new Error('--manifests and --kubeconfig exclude each other; give the one that the pods are to be read from');
  }
  if (byApi && kubeconfig === undefined && !env.KUBERNETES_SERVICE_HOST) {
    throw new Error(
      'neither --manifests nor --kubeconfig is given, and this is no pod (KUBERNETES_SERVICE_HOST is not set); ' +
        'give --manifests DIR, or --kubeconfig FILE for the Kubernetes API',
    );
  }
  const { POD_NAME: name, POD_NAMESPACE: namespace, POD_UID: uid } = env;
  const patience = env.EBBTIDE_READY_PATIENCE_SECONDS || String(DEFAULT_READY_PATIENCE_S);
  if (!/^\d{1,6}$/.test(patience)) {
    throw new Error(`EBBTIDE_READY_PATIENCE_SECONDS is ${JSON.stringify(patience)}; give a whole number of seconds`);
  }
  const keepByEnv = { true: true, false: false }[env.EBBTIDE_KEEP_ON_EXIT ?? ''];
  return {
    manifests,
    kubeconfig,
    ownPod: byApi && name && namespace ? { name, namespace, ...(uid ? { uid } : {}) } : undefined,
    rootCert: options.rootCert || undefined,
    excludedNamespaces: (env.EXCLUDE_NAMESPACES ?? EXCLUDED_NAMESPACES.join(','))
      .split(',')
      .map((each) => each.trim())
      .filter((each) => each !== ''),
    hostProc: resolve(options.hostProc),
    cniNetns: resolve(options.cniNetns),
    hostNetns: options.hostNetns || undefined,
    kubeletPort: portOf('--kubelet-port', options.kubeletPort) ?? 0,
    hold: holdOf(options.hold ?? (byApi ? 'refuse' : 'off'), options.podCgroup),
    classicGuard: options.guard === 'clsact',
    port: portOf('--port', options.port || (byApi ? String(AGENT_PORT) : 'none')),
    readyPatienceMs: Number(patience) * 1000,
    takeOver: options.takeOver ?? byApi,
    keep: options.keep ?? keepByEnv ?? (byApi ? undefined : false),
  };
}

/** The guard finds cgroups by itself: the pods' one is made anew with each boot. */
function bootGuardOf(options: RawOptions, hold: HoldOptions | undefined, facts: NodeFacts): AgentSettings['bootGuard'] {
  if (!options.bootGuard) return undefined;
  if (hold?.undecided !== 'refuse') {
    throw new Error('--boot-guard refuses undecided pods, so the agent must, too: give --hold refuse');
  }
  return { root: resolve(options.bootGuard), options: readBootGuard(options, facts) };
}

/** Where the agent sees that it is a pod, only what is beside it is held: several nodes may share a kernel. */
function ownPodsOnly(cgroup: string): { readonly podCgroup?: string } {
  const pods = podsCgroup();
  const podCgroup = pods === undefined ? undefined : join(cgroup, pods);
  return podCgroup !== undefined && existsSync(podCgroup) ? { podCgroup } : {};
}

function holdOf(how: 'refuse' | 'allow' | 'off', podCgroup: string | undefined): HoldOptions | undefined {
  if (how === 'off') return undefined;
  return { undecided: how, ...(podCgroup ? { podCgroup: resolve(podCgroup) } : {}) };
}

function portOf(flag: string, text: string): number | undefined {
  if (text === 'none') return undefined;
  const port = /^\d{1,5}$/.test(text) ? Number(text) : Number.NaN;
  if (!(port <= 65_535)) throw new Error(`${flag} is ${JSON.stringify(text)}; give a port, 0 for any, or "none"`);
  return port;
}
