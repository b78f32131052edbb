/** /config_dump: what the proxy knows, in the shape that `istioctl ztunnel-config` reads. Loaded when asked for. */
import type { X509Certificate } from 'node:crypto';
import ipaddr from 'ipaddr.js';
import type { CertificateInfo } from '../certificates/manager.js';
import type {
  AttributeOf,
  ConnectionInfo,
  EnginePolicy,
  EnginePolicyMatch,
  EngineService,
  EngineStringMatch,
  EngineWorkload,
  GatewayAddress,
  PortMapping,
} from '../engine.js';
import type { ProxySettings } from '../settings.js';
import type { DumpSources } from './sources.js';

const SCOPES = ['', 'Region', 'Zone', 'Subzone', 'Node', 'Cluster', 'Network'];
const MODES = ['Standard', 'Strict', 'Failover', 'Passthrough'];
const IP_FAMILIES = ['Automatic', 'IPv4', 'IPv6', 'Dual'];
const POLICY_SCOPES = { global: 'Global', namespace: 'Namespace', workload: 'WorkloadSelector' };

const ip = (bytes: Uint8Array): string => ipaddr.fromByteArray([...bytes]).toString();
const ports = (mappings: readonly PortMapping[]): Record<string, number> =>
  Object.fromEntries(mappings.map(({ servicePort, targetPort }) => [servicePort, targetPort]));

/** The dump as pretty JSON. It holds certificates but no keys and no tokens. */
export function configDump(sources: DumpSources): string {
  const { settings, engine } = sources;
  const { workloads, services, policies } = sources.state.everything();
  const endpoints = endpointsByService(workloads);
  const dump = {
    workloads: workloads.map(dumpWorkload),
    services: services.map((service) => dumpService(service, endpoints)),
    policies: policies.map(dumpPolicy),
    certificates: sources.certificates.list().map(dumpCertificate),
    workloadState: dumpPods(sources, engine.connections()),
    config: dumpSettings(settings),
    engine: engine.stats(),
    version: { version: sources.version, gitRevision: '', buildStatus: '', node: process.version },
  };
  return `${JSON.stringify(dump, undefined, 2)}\n`;
}

function dumpGateway(gateway: GatewayAddress | undefined): object | undefined {
  if (gateway === undefined) return undefined;
  const { hostname, address, hboneMtlsPort } = gateway;
  const destination =
    hostname !== undefined
      ? `${hostname.namespace}/${hostname.hostname}`
      : `${address?.network ?? ''}/${address === undefined ? '' : ip(address.address)}`;
  return { destination, hboneMtlsPort };
}

function dumpWorkload(workload: EngineWorkload): object {
  const { applicationTunnel } = workload;
  return {
    uid: workload.uid,
    workloadIps: workload.addresses.map(ip),
    waypoint: dumpGateway(workload.waypoint),
    networkGateway: dumpGateway(workload.networkGateway),
    protocol: workload.hbone ? 'HBONE' : 'TCP',
    name: workload.name,
    namespace: workload.namespace,
    serviceAccount: workload.serviceAccount,
    workloadName: workload.workloadName,
    workloadType: workload.workloadType,
    canonicalName: workload.canonicalName,
    canonicalRevision: workload.canonicalRevision,
    clusterId: workload.clusterId,
    trustDomain: workload.trustDomain,
    locality: workload.locality,
    node: workload.node,
    network: workload.network,
    networkMode: workload.hostNetwork ? 'HostNetwork' : 'Standard',
    status: workload.healthy ? 'Healthy' : 'Unhealthy',
    hostname: workload.hostname,
    capacity: workload.capacity,
    ...(applicationTunnel === undefined
      ? {}
      : { applicationTunnel: { protocol: applicationTunnel.proxy ? 'PROXY' : 'NONE', port: applicationTunnel.port } }),
    authorizationPolicies: workload.authorizationPolicies,
    services: workload.services.map(({ key }) => key),
  };
}

type Endpoints = ReadonlyMap<string, Readonly<Record<string, object>>>;

function endpointsByService(workloads: readonly EngineWorkload[]): Endpoints {
  const found = new Map<string, Record<string, object>>();
  for (const workload of workloads) {
    for (const { key, ports: mappings } of workload.services) {
      const endpoints = found.get(key) ?? {};
      found.set(key, endpoints);
      endpoints[workload.uid] = {
        workloadUid: workload.uid,
        service: key,
        port: ports(mappings),
        status: workload.healthy ? 'Healthy' : 'Unhealthy',
      };
    }
  }
  return found;
}

function dumpService(service: EngineService, endpoints: Endpoints): object {
  return {
    name: service.name,
    namespace: service.namespace,
    hostname: service.hostname,
    vips: service.vips.map(
      ({ network, address, length }) => `${network}/${ip(address)}${length === undefined ? '' : `/${length}`}`,
    ),
    ports: ports(service.ports),
    endpoints: endpoints.get(`${service.namespace}/${service.hostname}`) ?? {},
    subjectAltNames: service.subjectAltNames,
    waypoint: dumpGateway(service.waypoint),
    loadBalancer: {
      mode: MODES[service.mode] ?? String(service.mode),
      routingPreferences: service.routingPreference.map((scope) => SCOPES[scope] ?? String(scope)),
      healthPolicy: service.allowUnhealthy ? 'AllowAll' : 'OnlyHealthy',
    },
    ipFamilies: IP_FAMILIES[service.ipFamilies] ?? String(service.ipFamilies),
    canonical: service.canonical,
  };
}

function dumpPolicy(policy: EnginePolicy): object {
  return {
    name: policy.name,
    namespace: policy.namespace,
    scope: POLICY_SCOPES[policy.scope],
    action: policy.action === 'allow' ? 'Allow' : 'Deny',
    dryRun: policy.dryRun,
    rules: policy.rules.map((clauses) => clauses.map((matches) => matches.map(dumpMatch))),
  };
}

function dumpMatch(match: EnginePolicyMatch): object {
  const dumped: Record<string, unknown> = match.malformed ? { malformed: true } : {};
  const add = <T>(name: string, { anyOf, noneOf }: AttributeOf<T>, show: (element: T) => unknown): void => {
    if (anyOf.length > 0) dumped[name] = anyOf.map(show);
    if (noneOf.length > 0) dumped[`not${name.slice(0, 1).toUpperCase()}${name.slice(1)}`] = noneOf.map(show);
  };
  const cidr = ({ address, length }: { readonly address: Uint8Array; readonly length: number }): string =>
    `${ip(address)}/${length}`;
  add('namespaces', match.namespaces, dumpStringMatch);
  add('principals', match.principals, dumpStringMatch);
  add('serviceAccounts', match.serviceAccounts, (account) => account);
  add('sourceIps', match.sourceIps, cidr);
  add('destinationIps', match.destinationIps, cidr);
  add('destinationPorts', match.destinationPorts, (port) => port);
  return dumped;
}

function dumpStringMatch({ kind, value }: EngineStringMatch): object {
  return { [`${kind.slice(0, 1).toUpperCase()}${kind.slice(1)}`]: kind === 'presence' ? {} : value };
}

function dumpCertificate({ identity, state, certificate, error }: CertificateInfo): object {
  const show = (x509: X509Certificate): object => ({
    pem: Buffer.from(String(x509)).toString('base64'),
    serialNumber: BigInt(`0x${x509.serialNumber}`).toString(),
    validFrom: new Date(x509.validFrom).toISOString(),
    expirationTime: new Date(x509.validTo).toISOString(),
  });
  return {
    identity,
    state,
    certChain: certificate?.chain.map(show) ?? [],
    rootCerts: certificate?.roots.map(show) ?? [],
    ...(error === undefined ? {} : { error }),
  };
}

function dumpPods({ pods }: DumpSources, connections: readonly ConnectionInfo[]): object {
  const byPod = new Map<string, { readonly inbound: object[]; readonly outbound: object[] }>();
  for (const connection of connections) {
    const lists = byPod.get(connection.podUid) ?? { inbound: [], outbound: [] };
    byPod.set(connection.podUid, lists);
    const { source, destination, hboneAddress, protocol, peerIdentity, bytesSent, bytesReceived, ageMs } = connection;
    (connection.inbound ? lists.inbound : lists.outbound).push({
      src: source,
      originalDst: destination,
      actualDst: hboneAddress === '' ? destination : hboneAddress,
      protocol,
      peerIdentity,
      bytesSent,
      bytesReceived,
      ageMs,
    });
  }
  return Object.fromEntries(
    pods.list().map(({ info, state, identity }) => [
      info.uid,
      {
        state,
        connections: byPod.get(info.uid) ?? { inbound: [], outbound: [] },
        info: {
          name: info.name,
          namespace: info.namespace,
          serviceAccount: info.serviceAccount,
          trustDomain: identity.split('/')[2] ?? '',
        },
      },
    ]),
  );
}

/** The settings but for what is secret: the token (which may be literal) and added metadata. */
function dumpSettings(settings: ProxySettings): object {
  const endpoint = ({ host, port, rootCa, altHostname }: ProxySettings['xds']): object => ({
    address: `${host}:${port}`,
    rootCa: rootCa.includes('-----BEGIN') ? 'PEM' : rootCa,
    altHostname,
  });
  return {
    ...settings,
    xds: endpoint(settings.xds),
    ca: endpoint(settings.ca),
    metadata: Object.fromEntries(settings.metadata),
  };
}
