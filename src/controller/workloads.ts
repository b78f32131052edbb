/** Pod to WDS Workload. */
import { REDIRECTION_ANNOTATION, REDIRECTION_ENABLED } from '../mesh/labels.js';
import { istio } from '../mesh/proto/generated.js';
import { formatIp, parseIp } from './ip.js';
import { flat, keyOf, type Metadata, type Node, namespaceOf, type Pod, serviceAccountOf } from './objects.js';

/** Label on Pod: a value that contains `http` says that the pod itself speaks HBONE. */
export const TUNNEL_LABEL = 'networking.istio.io/tunnel';

export type Workload = istio.workload.Workload.$Properties;
const { NetworkMode, TunnelProtocol, WorkloadStatus, WorkloadType } = istio.workload;

/** Things a Workload depends on besides the Pod. */
export interface WorkloadContext {
  readonly clusterId: string;
  /** Empty for `cluster.local`, as the protocol's default is. */
  readonly trustDomain: string;
  readonly node: Node | undefined;
  /** Ports by Service key. */
  readonly services: ReadonlyMap<string, readonly istio.workload.Port.$Properties[]>;
  /** Keys of the selecting policies. */
  readonly policies: readonly string[];
  /** The pod belongs in the mesh and nobody can write that into its annotation (manifests). */
  readonly enrolled: boolean;
}

export interface ConvertedWorkload {
  /** Resource name. */
  readonly uid: string;
  readonly workload: Workload;
  /** `network/ip` of each address. */
  readonly aliases: readonly string[];
}

/** `<cluster>//Pod/<namespace>/<name>`: the group of Pod is empty. @param key `namespace/name` */
export function podUid(clusterId: string, key: string): string {
  return flat(clusterId, '//Pod/', key);
}

/** Addresses of a pod; undefined where it has none, or one that is no address: it cannot be reached then. */
export function addressesOf(pod: Pod): Uint8Array[] | undefined {
  const listed = (pod.status?.podIPs ?? []).map(({ ip }) => ip);
  const texts = listed.length > 0 || pod.status?.podIP === undefined ? listed : [pod.status.podIP];
  const addresses: Uint8Array[] = [];
  for (const text of texts) {
    const address = parseIp(String(text));
    if (address === undefined) return undefined;
    addresses.push(address);
  }
  return addresses.length > 0 ? addresses : undefined;
}

/** Whether the pod has run to its end; it keeps its addresses in the API although another pod may have them by now. */
export function isTerminal(pod: Pod): boolean {
  return pod.status?.phase === 'Succeeded' || pod.status?.phase === 'Failed';
}

/** Converts a pod; undefined where it has ended or has no addresses yet. */
export function convertPod(pod: Pod, context: WorkloadContext): ConvertedWorkload | undefined {
  if (isTerminal(pod)) return undefined;
  const addresses = addressesOf(pod);
  if (addresses === undefined) return undefined;
  const uid = podUid(context.clusterId, keyOf(pod));
  const hostNetwork = pod.spec?.hostNetwork === true;
  const workloadName = workloadNameOf(pod.metadata);
  const labels = pod.metadata.labels ?? {};
  const workload: Workload = {
    uid,
    name: pod.metadata.name,
    namespace: namespaceOf(pod),
    addresses,
    tunnelProtocol: !hostNetwork && hasTunnel(pod, context.enrolled) ? TunnelProtocol.HBONE : TunnelProtocol.NONE,
    trustDomain: context.trustDomain,
    serviceAccount: serviceAccountOf(pod),
    node: pod.spec?.nodeName ?? '',
    canonicalName:
      labels['service.istio.io/canonical-name'] ?? labels['app.kubernetes.io/name'] ?? labels.app ?? workloadName,
    canonicalRevision:
      labels['service.istio.io/canonical-revision'] ??
      labels['app.kubernetes.io/version'] ??
      labels.version ??
      'latest',
    // Always POD, as Istio does.
    workloadType: WorkloadType.POD,
    workloadName,
    services: portLists(context.services),
    authorizationPolicies: [...context.policies].sort(),
    status: isReady(pod) ? WorkloadStatus.HEALTHY : WorkloadStatus.UNHEALTHY,
    clusterId: context.clusterId,
    networkMode: hostNetwork ? NetworkMode.HOST_NETWORK : NetworkMode.STANDARD,
  };
  if (speaksTunnel(pod)) workload.nativeTunnel = true;
  const locality = localityOf(context.node);
  if (locality !== undefined) workload.locality = locality;
  return { uid, workload, aliases: hostNetwork ? [] : addresses.map((address) => flat('/', formatIp(address))) };
}

function hasTunnel(pod: Pod, enrolled: boolean): boolean {
  return enrolled || pod.metadata.annotations?.[REDIRECTION_ANNOTATION] === REDIRECTION_ENABLED || speaksTunnel(pod);
}

function speaksTunnel(pod: Pod): boolean {
  return pod.metadata.labels?.[TUNNEL_LABEL]?.includes('http') === true;
}

/** A pod without conditions is one of a manifest, where nobody probes it: it counts as ready. */
function isReady(pod: Pod): boolean {
  if (pod.metadata.deletionTimestamp !== undefined) return false;
  const conditions = pod.status?.conditions;
  if (conditions === undefined) return true;
  return conditions.some(({ type, status }) => type === 'Ready' && status === 'True');
}

/** Ports by Service, in a fixed order so that equal workloads are equal bytes. */
export function portLists(
  services: ReadonlyMap<string, readonly istio.workload.Port.$Properties[]>,
): Record<string, istio.workload.PortList.$Properties> {
  const lists: Record<string, istio.workload.PortList.$Properties> = {};
  for (const key of [...services.keys()].sort()) lists[key] = { ports: [...(services.get(key) ?? [])] };
  return lists;
}

/** Locality of a Node by its well-known labels. */
export function localityOf(node: Node | undefined): istio.workload.Locality.$Properties | undefined {
  const labels = node?.metadata.labels ?? {};
  const region = labels['topology.kubernetes.io/region'] ?? '';
  const zone = labels['topology.kubernetes.io/zone'] ?? '';
  const subzone = labels['topology.istio.io/subzone'] ?? '';
  return region === '' && zone === '' && subzone === '' ? undefined : { region, zone, subzone };
}

/** Name of what made the pod: the Deployment of a ReplicaSet, the CronJob of a Job, the owner, or the pod itself. */
export function workloadNameOf(metadata: Metadata): string {
  const label = metadata.labels?.['service.istio.io/workload-name'];
  if (label !== undefined) return label;
  const owner = metadata.ownerReferences?.find(({ controller }) => controller === true);
  if (owner === undefined || metadata.generateName === undefined) return metadata.name;
  if (owner.kind === 'ReplicaSet') {
    const hash = metadata.labels?.['pod-template-hash'];
    if (hash !== undefined && owner.name.endsWith(`-${hash}`)) return owner.name.slice(0, -hash.length - 1);
    return owner.name;
  }
  // A CronJob names its Jobs by the minute at which they were due.
  if (owner.kind === 'Job') return owner.name.replace(/-\d{8,10}$/, '');
  return owner.name;
}
