/** EndpointSlices of Services without a selector: which pods are behind them, and endpoints that are no pods. */
import { istio } from '../mesh/proto/generated.js';
import { formatIp, parseIp } from './ip.js';
import { type EndpointSlice, type Node, namespaceOf, type Service } from './objects.js';
import { appProtocolOf } from './services.js';
import { type ConvertedWorkload, localityOf } from './workloads.js';

type Port = istio.workload.Port.$Properties;
const { NetworkMode, WorkloadStatus, WorkloadType } = istio.workload;

/** Label that names the Service of a slice. */
const SERVICE_NAME_LABEL = 'kubernetes.io/service-name';

/** `namespace/name` of the Service that a slice belongs to. */
export function serviceOfSlice(slice: EndpointSlice): string | undefined {
  const name = slice.metadata.labels?.[SERVICE_NAME_LABEL];
  return name === undefined ? undefined : `${namespaceOf(slice)}/${name}`;
}

/** Service port to target port: a slice's ports bear the names of the Service's ports. TCP only. */
export function portsOfSlice(slice: EndpointSlice, service: Service): Port[] {
  const ports: Port[] = [];
  for (const { name, port, protocol } of slice.ports ?? []) {
    if ((protocol ?? 'TCP') !== 'TCP' || port === undefined) continue;
    const own = (service.spec?.ports ?? []).find((candidate) => (candidate.name ?? '') === (name ?? ''));
    if (own !== undefined) ports.push({ servicePort: own.port, targetPort: port, appProtocol: appProtocolOf(own) });
  }
  return ports;
}

/** `namespace/name` of the pods that a slice names. */
export function podsOfSlice(slice: EndpointSlice): string[] {
  const pods: string[] = [];
  for (const { targetRef } of slice.endpoints ?? []) {
    if (targetRef?.kind === 'Pod' && targetRef.name !== undefined) {
      pods.push(`${targetRef.namespace ?? namespaceOf(slice)}/${targetRef.name}`);
    }
  }
  return pods;
}

export interface EndpointContext {
  readonly clusterId: string;
  readonly trustDomain: string;
  readonly serviceKey: string;
  readonly nodes: ReadonlyMap<string, Node>;
}

/** Workloads of the endpoints that are no pods: plain addresses, without an identity and without policies. */
export function convertEndpoints(
  slice: EndpointSlice,
  service: Service,
  context: EndpointContext,
): ConvertedWorkload[] {
  const ports = portsOfSlice(slice, service);
  const workloads: ConvertedWorkload[] = [];
  for (const endpoint of slice.endpoints ?? []) {
    if (endpoint.targetRef?.kind === 'Pod') continue;
    // All addresses of an endpoint are the same thing; the first is what consumers use, says the API.
    const address = parseIp(endpoint.addresses?.[0] ?? '');
    if (address === undefined) continue;
    const text = formatIp(address);
    const uid = `${context.clusterId}/discovery.k8s.io/EndpointSlice/${namespaceOf(slice)}/${slice.metadata.name}/${text}`;
    const locality = localityOf(context.nodes.get(endpoint.nodeName ?? ''));
    workloads.push({
      uid,
      workload: {
        uid,
        name: `${slice.metadata.name}/${text}`,
        namespace: namespaceOf(slice),
        addresses: [address],
        node: endpoint.nodeName ?? '',
        trustDomain: context.trustDomain,
        workloadType: WorkloadType.POD,
        services: { [context.serviceKey]: { ports } },
        status: endpoint.conditions?.ready === false ? WorkloadStatus.UNHEALTHY : WorkloadStatus.HEALTHY,
        clusterId: context.clusterId,
        // Not unique by address: the proxy must not take whoever has this address for this workload.
        networkMode: NetworkMode.HOST_NETWORK,
        ...(locality === undefined ? {} : { locality }),
      },
      aliases: [],
    });
  }
  return workloads;
}
