/** WDS Workload to the engine's: checked, defaults filled in. */
import { DEFAULT_TRUST_DOMAIN } from '../../mesh/identity.js';
import { istio } from '../../mesh/proto/generated.js';
import type { EngineWorkload, GatewayAddress, PortMapping } from '../engine.js';
import { checkAddress, checkEnum, checkNotEmpty, checkPort, ResourceError } from './checks.js';

const { TunnelProtocol, WorkloadStatus, NetworkMode, ApplicationTunnel } = istio.workload;

const WORKLOAD_TYPES = ['deployment', 'cronjob', 'pod', 'job'] as const;

/** @throws ResourceError naming the field that cannot be used */
export function convertWorkload(workload: istio.workload.Workload.$Properties): EngineWorkload {
  const uid = checkNotEmpty(workload.uid, 'uid');
  const protocol = checkEnum(workload.tunnelProtocol, 2, 'tunnel_protocol');
  if (protocol === TunnelProtocol.LEGACY_ISTIO_MTLS) {
    throw new ResourceError('tunnel_protocol LEGACY_ISTIO_MTLS is not supported');
  }
  const waypoint = convertGateway(workload.waypoint, 'waypoint');
  const networkGateway = convertGateway(workload.networkGateway, 'network_gateway');
  const tunnel = workload.applicationTunnel;
  const locality = workload.locality;
  return {
    uid,
    name: workload.name ?? '',
    namespace: workload.namespace ?? '',
    addresses: (workload.addresses ?? []).map((address, index) => checkAddress(address, `addresses[${index}]`)),
    hostname: workload.hostname ?? '',
    network: workload.network ?? '',
    hbone: protocol === TunnelProtocol.HBONE,
    trustDomain: workload.trustDomain || DEFAULT_TRUST_DOMAIN,
    serviceAccount: workload.serviceAccount || 'default',
    ...(waypoint === undefined ? {} : { waypoint }),
    ...(networkGateway === undefined ? {} : { networkGateway }),
    node: workload.node ?? '',
    canonicalName: workload.canonicalName ?? '',
    canonicalRevision: workload.canonicalRevision ?? '',
    workloadName: workload.workloadName ?? '',
    workloadType: WORKLOAD_TYPES[checkEnum(workload.workloadType, 3, 'workload_type')] ?? 'pod',
    ...(tunnel
      ? {
          applicationTunnel: {
            proxy: checkEnum(tunnel.protocol, 1, 'application_tunnel.protocol') === ApplicationTunnel.Protocol.PROXY,
            port: checkPort(tunnel.port, 'application_tunnel.port'),
          },
        }
      : {}),
    services: Object.entries(workload.services ?? {}).map(([key, list]) => {
      if (!/^[^/]*\/[^/]+$/.test(key)) throw new ResourceError(`services has the key ${key}, not namespace/hostname`);
      return { key, ports: convertPorts(list.ports, `services[${key}]`) };
    }),
    authorizationPolicies: [...(workload.authorizationPolicies ?? [])],
    healthy: checkEnum(workload.status, 1, 'status') === WorkloadStatus.HEALTHY,
    clusterId: workload.clusterId || 'Kubernetes',
    locality: { region: locality?.region ?? '', zone: locality?.zone ?? '', subzone: locality?.subzone ?? '' },
    hostNetwork: checkEnum(workload.networkMode, 1, 'network_mode') === NetworkMode.HOST_NETWORK,
    // Absent is 1; a message without a value is 0: no traffic.
    capacity: workload.capacity ? (workload.capacity.value ?? 0) : 1,
  };
}

/** Port mappings; target 0 stands for a named port. */
export function convertPorts(
  ports: readonly istio.workload.Port.$Properties[] | null | undefined,
  where: string,
): PortMapping[] {
  return (ports ?? []).map((port, index) => ({
    servicePort: checkPort(port.servicePort, `${where}.ports[${index}].service_port`),
    targetPort: checkPort(port.targetPort, `${where}.ports[${index}].target_port`),
  }));
}

/** A gateway address, or undefined where the field is not set. A gateway without destination is an error. */
export function convertGateway(
  gateway: istio.workload.GatewayAddress.$Properties | null | undefined,
  where: string,
): GatewayAddress | undefined {
  if (!gateway) return undefined;
  const hboneMtlsPort = checkPort(gateway.hboneMtlsPort, `${where}.hbone_mtls_port`);
  if (gateway.hostname) {
    const hostname = checkNotEmpty(gateway.hostname.hostname, `${where}.hostname.hostname`);
    return { hostname: { namespace: gateway.hostname.namespace ?? '', hostname }, hboneMtlsPort };
  }
  if (gateway.address) {
    const address = checkAddress(gateway.address.address, `${where}.address`);
    return { address: { network: gateway.address.network ?? '', address }, hboneMtlsPort };
  }
  throw new ResourceError(`${where} has no destination`);
}
