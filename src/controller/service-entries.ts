/** ServiceEntry to WDS Services, and its endpoints and WorkloadEntries to Workloads. */
import { REDIRECTION_ANNOTATION, REDIRECTION_ENABLED } from '../mesh/labels.js';
import { istio } from '../mesh/proto/generated.js';
import { formatIp, parseCidr, parseIp } from './ip.js';
import {
  keyOf,
  namespaceOf,
  type Pod,
  type ServiceEntry,
  type WorkloadEntry,
  type WorkloadEntrySpec,
} from './objects.js';
import { appProtocolOf } from './services.js';
import { TUNNEL_LABEL, type Workload } from './workloads.js';

type Port = istio.workload.Port.$Properties;
type WdsService = istio.workload.Service.$Properties;
const { Mode, HealthPolicy } = istio.workload.LoadBalancing;
const { IPFamilies, TunnelProtocol, WorkloadStatus, WorkloadType } = istio.workload;

export interface ConvertedEntry {
  /** One Service for each host. */
  readonly services: readonly {
    readonly key: string;
    readonly service: WdsService;
    readonly aliases: readonly string[];
  }[];
  readonly problems: readonly string[];
}

const HOST = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$/;

/** Converts the services of an entry; what is not supported is left out and told. */
export function convertServiceEntry(entry: ServiceEntry): ConvertedEntry {
  const spec = entry.spec ?? {};
  const namespace = namespaceOf(entry);
  const problems: string[] = [];
  const addresses: istio.workload.NetworkAddress.$Properties[] = [];
  const aliases: string[] = [];
  const assigned = (spec.addresses?.length ?? 0) > 0 ? [] : (entry.status?.addresses ?? []);
  for (const text of [...(spec.addresses ?? []), ...assigned.map(({ value }) => value ?? '')]) {
    const block = parseCidr(text);
    if (block === undefined) {
      problems.push(`address ${JSON.stringify(text)} is neither an address nor a block; it is left out`);
      continue;
    }
    const whole = block.length === block.address.length * 8;
    addresses.push({ network: '', address: block.address, ...(whole ? {} : { length: block.length }) });
    aliases.push(`/${formatIp(block.address)}${whole ? '' : `/${block.length}`}`);
  }
  const resolution = spec.resolution ?? 'NONE';
  const named = (spec.endpoints ?? []).filter(({ address }) => parseIp(address ?? '') === undefined);
  if (!['NONE', 'STATIC', 'DNS', 'DNS_ROUND_ROBIN'].includes(resolution)) {
    problems.push(`resolution ${resolution} is not supported; its addresses have no endpoints`);
  } else if (resolution.startsWith('DNS') && spec.workloadSelector === undefined) {
    const names = (spec.endpoints?.length ?? 0) === 0 || named.length > 0;
    if (names) problems.push('resolution by DNS is not supported: connections to its addresses are refused');
  } else if (named.length > 0) {
    problems.push(`endpoint ${JSON.stringify(named[0]?.address ?? '')} is no IP address; it is left out`);
  }
  if (spec.exportTo?.some((scope) => scope !== '*' && scope !== '.')) {
    problems.push('exportTo with names of namespaces is not supported: visible to its own namespace only');
  }
  const everywhere = (spec.exportTo?.length ?? 0) === 0 || spec.exportTo?.includes('*') === true;
  const ports = (spec.ports ?? []).map((port) => ({
    servicePort: port.number,
    targetPort: port.targetPort ?? port.number,
    appProtocol: appProtocolOf({ appProtocol: port.protocol ?? '' }),
  }));
  const services: ConvertedEntry['services'][number][] = [];
  for (const host of spec.hosts ?? []) {
    if (!HOST.test(host)) {
      const why = host.includes('*') ? 'a wildcard, which is not supported' : 'no host name';
      problems.push(`host ${JSON.stringify(host)} is ${why}; it is left out`);
      continue;
    }
    const service: WdsService = {
      name: entry.metadata.name,
      namespace,
      hostname: host,
      addresses,
      ports,
      ipFamilies: IPFamilies.AUTOMATIC,
      subjectAltNames: [...(spec.subjectAltNames ?? [])],
      visibility: everywhere ? istio.workload.Service.Visibility.PUBLIC : istio.workload.Service.Visibility.NAMESPACE,
    };
    if (resolution === 'NONE') service.loadBalancing = { mode: Mode.PASSTHROUGH, healthPolicy: HealthPolicy.ALLOW_ALL };
    services.push({ key: `${namespace}/${host}`, service, aliases });
  }
  return { services, problems };
}

/** Ports under which something that an entry selects serves it: by the port's name, else the entry's target, else the same. */
export function portsForEntry(entry: ServiceEntry, targets: (name: string) => number | undefined): Port[] {
  return (entry.spec?.ports ?? []).map((port) => ({
    servicePort: port.number,
    targetPort: targets(port.name ?? '') ?? port.targetPort ?? port.number,
    appProtocol: appProtocolOf({ appProtocol: port.protocol ?? '' }),
  }));
}

/** TCP port of a pod by its name. */
export function containerPort(pod: Pod, name: string): number | undefined {
  for (const { ports } of pod.spec?.containers ?? []) {
    for (const port of ports ?? []) {
      if (port.name === name && (port.protocol ?? 'TCP') === 'TCP') return port.containerPort;
    }
  }
  return undefined;
}

export interface EndpointWorkload {
  readonly uid: string;
  readonly workload: Workload;
  readonly aliases: readonly string[];
}

export interface EntryContext {
  readonly clusterId: string;
  /** Empty for `cluster.local`. */
  readonly trustDomain: string;
  /** Ports by Service key. */
  readonly services: ReadonlyMap<string, readonly Port[]>;
  readonly policies: readonly string[];
}

/** A workload of the endpoints that stand in a ServiceEntry; undefined where its address is none. */
export function convertInlineEndpoint(
  entry: ServiceEntry,
  endpoint: WorkloadEntrySpec,
  context: EntryContext,
): EndpointWorkload | undefined {
  const address = parseIp(endpoint.address ?? '');
  if (address === undefined) return undefined;
  const uid = `${context.clusterId}/networking.istio.io/ServiceEntry/${keyOf(entry)}/${formatIp(address)}`;
  return describe(
    uid,
    entry.metadata.name,
    namespaceOf(entry),
    endpoint,
    endpoint.labels ?? {},
    address,
    false,
    context,
  );
}

/** A workload that is no pod, a machine for instance; undefined where its address is none. */
export function convertWorkloadEntry(entry: WorkloadEntry, context: EntryContext): EndpointWorkload | undefined {
  const spec = entry.spec ?? {};
  const address = parseIp(spec.address ?? '');
  if (address === undefined) return undefined;
  const uid = `${context.clusterId}/networking.istio.io/WorkloadEntry/${keyOf(entry)}`;
  const enrolled = entry.metadata.annotations?.[REDIRECTION_ANNOTATION] === REDIRECTION_ENABLED;
  return describe(uid, entry.metadata.name, namespaceOf(entry), spec, labelsOf(entry), address, enrolled, context);
}

/** Labels by which selectors choose a WorkloadEntry: its own, and those in its spec, which Istio takes first. */
export function labelsOf(entry: WorkloadEntry): Readonly<Record<string, string>> {
  return { ...entry.metadata.labels, ...entry.spec?.labels };
}

function describe(
  uid: string,
  name: string,
  namespace: string,
  spec: WorkloadEntrySpec,
  labels: Readonly<Record<string, string>>,
  address: Uint8Array,
  enrolled: boolean,
  context: EntryContext,
): EndpointWorkload {
  const nativeTunnel = labels[TUNNEL_LABEL]?.includes('http') === true;
  const [region = '', zone = '', subzone = ''] = (spec.locality ?? '').split('/');
  const workload: Workload = {
    uid,
    name,
    namespace,
    addresses: [address],
    network: spec.network ?? '',
    tunnelProtocol: enrolled || nativeTunnel ? TunnelProtocol.HBONE : TunnelProtocol.NONE,
    trustDomain: context.trustDomain,
    serviceAccount: spec.serviceAccount ?? '',
    canonicalName:
      labels['service.istio.io/canonical-name'] ?? labels['app.kubernetes.io/name'] ?? labels['app'] ?? name,
    canonicalRevision:
      labels['service.istio.io/canonical-revision'] ??
      labels['app.kubernetes.io/version'] ??
      labels['version'] ??
      'latest',
    workloadType: WorkloadType.POD,
    workloadName: name,
    services: Object.fromEntries(
      [...context.services].sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, ports]) => [key, { ports: [...ports] }]),
    ),
    authorizationPolicies: [...context.policies].sort(),
    status: WorkloadStatus.HEALTHY,
    clusterId: context.clusterId,
  };
  if (nativeTunnel) workload.nativeTunnel = true;
  if (spec.weight !== undefined && spec.weight > 0) workload.capacity = { value: spec.weight };
  if (region !== '') workload.locality = { region, zone, subzone };
  return { uid, workload, aliases: [`${spec.network ?? ''}/${formatIp(address)}`] };
}
