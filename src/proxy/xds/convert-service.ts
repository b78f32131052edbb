/** WDS Service to the engine's. */
import { istio } from '../../mesh/proto/generated.js';
import type { EngineService } from '../engine.js';
import { checkAddress, checkEnum, checkNotEmpty, ResourceError } from './checks.js';
import { convertGateway, convertPorts } from './convert-workload.js';

const { Service, LoadBalancing } = istio.workload;

/** @throws ResourceError naming the field that cannot be used */
export function convertService(service: istio.workload.Service.$Properties): EngineService {
  const hostname = checkNotEmpty(service.hostname, 'hostname');
  const waypoint = convertGateway(service.waypoint, 'waypoint');
  const balancing = service.loadBalancing;
  return {
    name: service.name ?? '',
    namespace: service.namespace ?? '',
    hostname,
    vips: (service.addresses ?? []).map(convertVip),
    ports: convertPorts(service.ports, 'service'),
    subjectAltNames: [...(service.subjectAltNames ?? [])],
    ...(waypoint === undefined ? {} : { waypoint }),
    weightedWaypoints: (service.weightedWaypoints ?? []).map((weighted, index) => {
      const destination = convertGateway(weighted.destination, `weighted_waypoints[${index}]`);
      if (destination === undefined) throw new ResourceError(`weighted_waypoints[${index}] has no destination`);
      return { destination, weight: weighted.weight ?? 0 };
    }),
    routingPreference: (balancing?.routingPreference ?? []).map((scope) => {
      const value = checkEnum(scope, 6, 'load_balancing.routing_preference');
      if (value === LoadBalancing.Scope.UNSPECIFIED_SCOPE) {
        throw new ResourceError('load_balancing.routing_preference holds UNSPECIFIED_SCOPE');
      }
      return value;
    }),
    mode: checkEnum(balancing?.mode, 3, 'load_balancing.mode'),
    allowUnhealthy:
      checkEnum(balancing?.healthPolicy, 1, 'load_balancing.health_policy') === LoadBalancing.HealthPolicy.ALLOW_ALL,
    ipFamilies: checkEnum(service.ipFamilies, 3, 'ip_families'),
    canonical: service.canonical ?? false,
    // An unknown visibility is public, as in ztunnel.
    namespaceVisibility: service.visibility === Service.Visibility.NAMESPACE,
  };
}

function convertVip(vip: istio.workload.NetworkAddress.$Properties, index: number): EngineService['vips'][number] {
  const address = checkAddress(vip.address, `addresses[${index}]`);
  const length = vip.length ?? undefined;
  if (length !== undefined && length > address.length * 8) {
    throw new ResourceError(`addresses[${index}] has a prefix of ${length} bits`);
  }
  return { network: vip.network ?? '', address, ...(length === undefined ? {} : { length }) };
}
