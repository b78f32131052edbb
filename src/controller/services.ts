/** Service to WDS Service, and the ports under which a pod serves it. */
import { istio } from '../mesh/proto/generated.js';
import { formatIp, parseIp } from './ip.js';
import { namespaceOf, type Pod, type Service, type ServicePort } from './objects.js';

type WdsService = istio.workload.Service.$Properties;
type Port = istio.workload.Port.$Properties;
type LoadBalancing = istio.workload.LoadBalancing.$Properties;
const { AppProtocol, IPFamilies } = istio.workload;
const { Scope, Mode, HealthPolicy } = istio.workload.LoadBalancing;

/** Annotation on Service and Namespace, older than the field of the same meaning. */
const TRAFFIC_DISTRIBUTION_ANNOTATION = 'networking.istio.io/traffic-distribution';

/** Things a Service's conversion depends on besides the Service. */
export interface ServiceContext {
  readonly clusterDomain: string;
  /** Annotations of the Service's namespace. */
  readonly namespaceAnnotations?: Readonly<Record<string, string>> | undefined;
}

export interface ConvertedService {
  /** Resource name: `namespace/hostname`. */
  readonly key: string;
  readonly service: WdsService;
  /** `network/ip` of each VIP; the network is always the empty one. */
  readonly aliases: readonly string[];
  readonly problems: readonly string[];
}

/** `name.namespace.svc.<domain>`. */
export function hostnameOf(service: Service, clusterDomain: string): string {
  return `${service.metadata.name}.${namespaceOf(service)}.svc.${clusterDomain}`;
}

/** Resource name of a Service. */
export function serviceKey(service: Service, clusterDomain: string): string {
  return `${namespaceOf(service)}/${hostnameOf(service, clusterDomain)}`;
}

/** Converts a Service; undefined for ExternalName, which has no endpoints here. */
export function convertService(object: Service, context: ServiceContext): ConvertedService | undefined {
  const spec = object.spec ?? {};
  if (spec.type === 'ExternalName') return undefined;
  const problems: string[] = [];
  const namespace = namespaceOf(object);
  const hostname = hostnameOf(object, context.clusterDomain);
  const addresses: Uint8Array[] = [];
  const single = spec.clusterIP === undefined ? [] : [spec.clusterIP];
  for (const text of spec.clusterIPs?.length ? spec.clusterIPs : single) {
    if (text === '' || text === 'None') continue;
    const address = parseIp(text);
    if (address === undefined) problems.push(`clusterIP ${JSON.stringify(text)} is no IP address; it is left out`);
    else addresses.push(address);
  }
  const service: WdsService = {
    name: object.metadata.name,
    namespace,
    hostname,
    addresses: addresses.map((address) => ({ network: '', address })),
    ports: (spec.ports ?? []).map((port) => ({
      servicePort: port.port,
      targetPort: typeof port.targetPort === 'string' ? numeric(port.targetPort) : (port.targetPort ?? port.port),
      appProtocol: appProtocolOf(port),
    })),
    ipFamilies: ipFamiliesOf(spec.ipFamilies ?? []),
    canonical: true,
  };
  const loadBalancing = loadBalancingOf(object, context);
  if (loadBalancing !== undefined) service.loadBalancing = loadBalancing;
  return {
    key: `${namespace}/${hostname}`,
    service,
    aliases: addresses.map((address) => `/${formatIp(address)}`),
    problems,
  };
}

/**
 * The ports under which a pod serves a Service. A named target port that the pod does not have is left out: the pod is no
 * endpoint for that port.
 */
export function portsForPod(service: Service, pod: Pod): Port[] {
  const ports: Port[] = [];
  for (const port of service.spec?.ports ?? []) {
    const target = targetPortOf(port, pod);
    if (target !== undefined) {
      ports.push({ servicePort: port.port, targetPort: target, appProtocol: appProtocolOf(port) });
    }
  }
  return ports;
}

function targetPortOf(port: ServicePort, pod: Pod): number | undefined {
  const { targetPort } = port;
  if (targetPort === undefined || targetPort === null) return port.port;
  if (typeof targetPort === 'number') return targetPort;
  const number = numeric(targetPort);
  if (number !== 0) return number;
  // Init containers count only where they keep running beside the others.
  const sidecars = (pod.spec?.initContainers ?? []).filter(({ restartPolicy }) => restartPolicy === 'Always');
  for (const container of [...(pod.spec?.containers ?? []), ...sidecars]) {
    for (const candidate of container.ports ?? []) {
      if (candidate.name === targetPort && (candidate.protocol ?? 'TCP') === 'TCP') return candidate.containerPort;
    }
  }
  return undefined;
}

/** A target port that is a number in quotes, or 0: "named, see the workload". */
function numeric(targetPort: string): number {
  return /^\d{1,5}$/.test(targetPort) ? Number(targetPort) : 0;
}

/** Protocol by `appProtocol`, else by the prefix of the port's name, as Istio selects it. */
export function appProtocolOf(port: Pick<ServicePort, 'name' | 'appProtocol'>): istio.workload.AppProtocol {
  const name = port.appProtocol ?? port.name?.split('-')[0] ?? '';
  switch (name.toLowerCase()) {
    case 'http':
    case 'http1':
    case 'kubernetes.io/ws':
      return AppProtocol.HTTP11;
    case 'http2':
    case 'kubernetes.io/h2c':
      return AppProtocol.HTTP2;
    case 'grpc':
    case 'grpc-web':
      return AppProtocol.GRPC;
    case 'tcp':
      return AppProtocol.TCP;
    case 'tls':
    case 'https':
    case 'kubernetes.io/wss':
      return AppProtocol.TLS;
    default:
      return AppProtocol.UNKNOWN;
  }
}

function ipFamiliesOf(families: readonly string[]): istio.workload.IPFamilies {
  if (families.length === 2) return IPFamilies.DUAL;
  if (families[0] === 'IPv4') return IPFamilies.IPV4_ONLY;
  if (families[0] === 'IPv6') return IPFamilies.IPV6_ONLY;
  return IPFamilies.AUTOMATIC;
}

function loadBalancingOf(object: Service, context: ServiceContext): LoadBalancing | undefined {
  const spec = object.spec ?? {};
  const healthPolicy = spec.publishNotReadyAddresses === true ? HealthPolicy.ALLOW_ALL : HealthPolicy.ONLY_HEALTHY;
  if (spec.internalTrafficPolicy === 'Local') {
    return { routingPreference: [Scope.NODE], mode: Mode.STRICT, healthPolicy };
  }
  const distribution =
    spec.trafficDistribution ??
    object.metadata.annotations?.[TRAFFIC_DISTRIBUTION_ANNOTATION] ??
    context.namespaceAnnotations?.[TRAFFIC_DISTRIBUTION_ANNOTATION];
  switch (distribution) {
    case 'PreferClose':
    case 'PreferSameZone':
      return { routingPreference: [Scope.NETWORK, Scope.REGION, Scope.ZONE], mode: Mode.FAILOVER, healthPolicy };
    case 'PreferSameNode':
      return {
        routingPreference: [Scope.NETWORK, Scope.REGION, Scope.ZONE, Scope.SUBZONE, Scope.NODE],
        mode: Mode.FAILOVER,
        healthPolicy,
      };
    default:
      return spec.publishNotReadyAddresses === true ? { healthPolicy } : undefined;
  }
}
