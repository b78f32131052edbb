/** Pods, Services and EndpointSlices to WDS. */
import { describe, expect, test } from 'vitest';
import { parseCidr, parseIp } from '../../src/controller/ip.ts';
import type { ClusterObjects, EndpointSlice, Pod, Service } from '../../src/controller/objects.ts';
import { type BuilderOptions, ResourceBuilder } from '../../src/controller/resources.ts';
import { appProtocolOf } from '../../src/controller/services.ts';
import { workloadNameOf } from '../../src/controller/workloads.ts';
import { istio } from '../../src/mesh/proto/generated.js';

const { NetworkMode, TunnelProtocol, WorkloadStatus, IPFamilies, AppProtocol } = istio.workload;
const { Scope, Mode, HealthPolicy } = istio.workload.LoadBalancing;

const options: BuilderOptions = {
  clusterId: 'Kubernetes',
  trustDomain: 'cluster.local',
  clusterDomain: 'cluster.local',
  belongsInMesh: (_pod, namespace) => namespace?.metadata.labels?.['istio.io/dataplane-mode'] === 'ambient',
};

const objects = (some: Partial<ClusterObjects>): ClusterObjects => ({
  namespaces: [],
  nodes: [],
  pods: [],
  services: [],
  endpointSlices: [],
  authorizationPolicies: [],
  peerAuthentications: [],
  ...some,
});

function build(some: Partial<ClusterObjects>, builder = new ResourceBuilder(options)) {
  const { addresses } = builder.build(objects(some));
  const decoded = new Map<string, istio.workload.Address>();
  for (const [name, { value }] of addresses) decoded.set(name, istio.workload.Address.decode(value));
  return {
    names: [...addresses.keys()],
    workload: (name: string) => decoded.get(name)?.workload,
    service: (name: string) => decoded.get(name)?.service,
    addresses,
  };
}

const pod = (name: string, some: { metadata?: object; spec?: object; status?: object } = {}): Pod => ({
  metadata: { name, namespace: 'shop', uid: name, ...some.metadata },
  spec: { nodeName: 'n1', serviceAccountName: 'web', ...some.spec },
  status: { podIP: '10.0.0.1', ...some.status },
});
const UID = 'Kubernetes//Pod/shop/a';

describe('Workload from Pod', () => {
  test('in full', () => {
    const { workload, names } = build({
      nodes: [
        {
          metadata: {
            name: 'n1',
            labels: {
              'topology.kubernetes.io/region': 'r',
              'topology.kubernetes.io/zone': 'z',
              'topology.istio.io/subzone': 's',
            },
          },
        },
      ],
      pods: [
        pod('a', {
          metadata: { labels: { app: 'shop', version: 'v2' } },
          status: { podIPs: [{ ip: '10.0.0.1' }, { ip: 'fd00::1' }], podIP: '10.0.0.9' },
        }),
      ],
    });
    expect(names).toEqual([UID]);
    expect(workload(UID)).toMatchObject({
      uid: UID,
      name: 'a',
      namespace: 'shop',
      node: 'n1',
      serviceAccount: 'web',
      clusterId: 'Kubernetes',
      canonicalName: 'shop',
      canonicalRevision: 'v2',
      workloadName: 'a',
      locality: { region: 'r', zone: 'z', subzone: 's' },
    });
    expect(workload(UID)?.addresses?.map((address) => [...address])).toEqual([
      [10, 0, 0, 1],
      [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]);
    expect(workload(UID)?.trustDomain ?? '').toBe('');
  });

  test('another trust domain is named', () => {
    const builder = new ResourceBuilder({ ...options, trustDomain: 'prod' });
    expect(build({ pods: [pod('a')] }, builder).workload(UID)?.trustDomain).toBe('prod');
  });

  test.each([
    ['pending with an address', { phase: 'Pending', conditions: [] }, 'UNHEALTHY'],
    ['no status of conditions', {}, 'HEALTHY'],
    ['ready', { conditions: [{ type: 'Ready', status: 'True' }] }, 'HEALTHY'],
    ['not ready', { conditions: [{ type: 'Ready', status: 'False' }] }, 'UNHEALTHY'],
    ['succeeded', { phase: 'Succeeded' }, undefined],
    ['failed', { phase: 'Failed' }, undefined],
    ['no address', { podIP: undefined }, undefined],
    ['no valid address', { podIP: '10.0.0' }, undefined],
  ])('status: %s', (_name, status, expected) => {
    const workload = build({ pods: [pod('a', { status })] }).workload(UID);
    if (expected === undefined) expect(workload).toBeUndefined();
    else expect(WorkloadStatus[workload?.status ?? WorkloadStatus.HEALTHY]).toBe(expected);
  });

  test('a pod that is being deleted is not healthy', () => {
    const deleted = pod('a', { metadata: { deletionTimestamp: '2026-01-01T00:00:00Z' } });
    expect(build({ pods: [deleted] }).workload(UID)?.status).toBe(WorkloadStatus.UNHEALTHY);
  });

  const enabled = { 'ambient.istio.io/redirection': 'enabled' };
  const netns = { 'ebbtide.dev/netns': '/run/netns/a' };
  test.each([
    ['annotated', enabled, false, {}, TunnelProtocol.HBONE],
    ['pending', { 'ambient.istio.io/redirection': 'pending' }, true, {}, TunnelProtocol.NONE],
    ['belongs in the mesh and names its netns', netns, true, {}, TunnelProtocol.HBONE],
    ['names its netns, not in the mesh', netns, false, {}, TunnelProtocol.NONE],
    ['in the mesh, no netns, nobody annotated it', {}, true, {}, TunnelProtocol.NONE],
    ['host network', { ...enabled, ...netns }, true, { hostNetwork: true }, TunnelProtocol.NONE],
  ])('tunnel: %s', (_name, annotations, ambient, spec, expected) => {
    const labels = ambient ? { 'istio.io/dataplane-mode': 'ambient' } : {};
    const { workload } = build({
      namespaces: [{ metadata: { name: 'shop', labels } }],
      pods: [pod('a', { metadata: { annotations }, spec })],
    });
    expect(workload(UID)?.tunnelProtocol ?? TunnelProtocol.NONE).toBe(expected);
    const mode = 'hostNetwork' in spec ? NetworkMode.HOST_NETWORK : NetworkMode.STANDARD;
    expect(workload(UID)?.networkMode ?? NetworkMode.STANDARD).toBe(mode);
  });

  test('a pod that speaks HBONE itself says so by its label', () => {
    const workload = build({
      pods: [pod('a', { metadata: { labels: { 'networking.istio.io/tunnel': 'http' } } })],
    }).workload(UID);
    expect([workload?.tunnelProtocol, workload?.nativeTunnel]).toEqual([TunnelProtocol.HBONE, true]);
  });

  test.each([
    ['ReplicaSet', 'web-5d4f8c7b9', { 'pod-template-hash': '5d4f8c7b9' }, 'web'],
    ['ReplicaSet', 'web-abc', {}, 'web-abc'],
    ['Job', 'backup-28391040', {}, 'backup'],
    ['Job', 'once', {}, 'once'],
    ['StatefulSet', 'db', {}, 'db'],
    ['ReplicaSet', 'web-1', { 'service.istio.io/workload-name': 'other' }, 'other'],
  ])('workload name of %s %s', (kind, name, labels, expected) => {
    const ownerReferences = [{ kind, name, controller: true }];
    expect(workloadNameOf({ name: 'p', generateName: 'p-', labels, ownerReferences })).toBe(expected);
    if (expected !== 'other') expect(workloadNameOf({ name: 'p', labels, ownerReferences })).toBe('p');
  });

  test('lists its policies, sorted, and follows their change', () => {
    const builder = new ResourceBuilder(options);
    const a = pod('a', { metadata: { labels: { app: 'db' } } });
    const selector = { matchLabels: { app: 'db' } };
    const policies = [
      { metadata: { name: 'z', namespace: 'shop' }, spec: { selector } },
      { metadata: { name: 'a', namespace: 'istio-system' }, spec: { selector } },
    ];
    const strict = [{ metadata: { name: 's', namespace: 'shop' }, spec: { mtls: { mode: 'STRICT' } } }];
    const before = build({ pods: [a], authorizationPolicies: policies, peerAuthentications: strict }, builder);
    expect(before.workload(UID)?.authorizationPolicies).toEqual([
      'istio-system/a',
      'istio-system/istio_converted_static_strict',
      'shop/z',
    ]);
    expect(build({ pods: [a] }, builder).workload(UID)?.authorizationPolicies).toEqual([]);
  });
});

describe('Service', () => {
  const service = (spec: NonNullable<Service['spec']>, metadata: object = {}): Service => ({
    metadata: { name: 'web', namespace: 'shop', ...metadata },
    spec,
  });
  const KEY = 'shop/web.shop.svc.cluster.local';
  const ports = [
    { name: 'http-main', port: 80, targetPort: 8080 },
    { name: 'admin', port: 81, targetPort: 'admin', appProtocol: 'kubernetes.io/h2c' },
    { port: 82 },
  ];

  test('with VIPs and ports; named target ports are of the pod', () => {
    const { service: found, workload } = build({
      services: [
        service({ clusterIPs: ['10.96.0.1', 'fd00::9'], selector: { app: 'x' }, ports, ipFamilies: ['IPv4', 'IPv6'] }),
      ],
      pods: [
        pod('a', {
          metadata: { labels: { app: 'x', more: 'y' } },
          spec: {
            containers: [
              {
                ports: [
                  { name: 'admin', containerPort: 9000, protocol: 'UDP' },
                  { name: 'admin', containerPort: 9001 },
                ],
              },
            ],
          },
        }),
        pod('b', {
          metadata: { labels: { app: 'x' } },
          spec: {
            initContainers: [
              { ports: [{ name: 'admin', containerPort: 1 }] },
              { restartPolicy: 'Always', ports: [{ name: 'admin', containerPort: 2 }] },
            ],
          },
        }),
        pod('c', { metadata: { labels: { app: 'x' } } }),
        pod('d', { metadata: { labels: { app: 'y' } } }),
        pod('e', { metadata: { namespace: 'other', labels: { app: 'x' } } }),
      ],
    });
    expect(found(KEY)).toMatchObject({
      name: 'web',
      namespace: 'shop',
      hostname: 'web.shop.svc.cluster.local',
      canonical: true,
      ipFamilies: IPFamilies.DUAL,
    });
    expect(found(KEY)?.addresses?.map(({ address }) => address?.length)).toEqual([4, 16]);
    const flat = (list: istio.workload.Port.$Properties[] | null | undefined) =>
      (list ?? []).map(({ servicePort, targetPort }) => `${servicePort}:${targetPort ?? 0}`).join(' ');
    expect(flat(found(KEY)?.ports)).toBe('80:8080 81:0 82:82');
    const of = (name: string) => workload(`Kubernetes//Pod/shop/${name}`)?.services;
    expect(flat(of('a')?.[KEY]?.ports)).toBe('80:8080 81:9001 82:82');
    expect(flat(of('b')?.[KEY]?.ports)).toBe('80:8080 81:2 82:82');
    expect(flat(of('c')?.[KEY]?.ports)).toBe('80:8080 82:82');
    expect(of('d')).toEqual({});
    expect(workload('Kubernetes//Pod/other/e')?.services).toEqual({});
  });

  test('headless keeps members and has no address; ExternalName is left out; an empty selector selects nothing', () => {
    const pods = [pod('a', { metadata: { labels: { app: 'x' } } })];
    const headless = build({ pods, services: [service({ clusterIP: 'None', selector: { app: 'x' }, ports })] });
    expect(headless.service(KEY)?.addresses).toEqual([]);
    expect(Object.keys(headless.workload(UID)?.services ?? {})).toEqual([KEY]);
    expect(build({ pods, services: [service({ type: 'ExternalName', selector: { app: 'x' } })] }).names).toEqual([UID]);
    expect(build({ pods, services: [service({ selector: {}, ports })] }).workload(UID)?.services).toEqual({});
  });

  test.each([
    [{}, {}, {}, undefined],
    [{ internalTrafficPolicy: 'Local' }, {}, {}, { routingPreference: [Scope.NODE], mode: Mode.STRICT }],
    [
      { trafficDistribution: 'PreferClose' },
      {},
      {},
      { routingPreference: [Scope.NETWORK, Scope.REGION, Scope.ZONE], mode: Mode.FAILOVER },
    ],
    [{}, { 'networking.istio.io/traffic-distribution': 'PreferSameZone' }, {}, { mode: Mode.FAILOVER }],
    [
      {},
      {},
      { 'networking.istio.io/traffic-distribution': 'PreferSameNode' },
      { routingPreference: [Scope.NETWORK, Scope.REGION, Scope.ZONE, Scope.SUBZONE, Scope.NODE] },
    ],
    [{ trafficDistribution: 'Any' }, { 'networking.istio.io/traffic-distribution': 'PreferClose' }, {}, undefined],
    [{ publishNotReadyAddresses: true }, {}, {}, { healthPolicy: HealthPolicy.ALLOW_ALL }],
    [
      { publishNotReadyAddresses: true, trafficDistribution: 'PreferClose' },
      {},
      {},
      { mode: Mode.FAILOVER, healthPolicy: HealthPolicy.ALLOW_ALL },
    ],
  ])(
    'load balancing of %j, annotations %j, of the namespace %j',
    (spec, annotations, namespaceAnnotations, expected) => {
      const { service: found } = build({
        namespaces: [{ metadata: { name: 'shop', annotations: namespaceAnnotations as Record<string, string> } }],
        services: [service(spec, { annotations })],
      });
      if (expected === undefined) expect(found(KEY)?.loadBalancing ?? undefined).toBeUndefined();
      else expect(found(KEY)?.loadBalancing).toMatchObject(expected);
    },
  );

  test.each([
    ['http-web', undefined, AppProtocol.HTTP11],
    ['grpc', undefined, AppProtocol.GRPC],
    ['web', undefined, AppProtocol.UNKNOWN],
    ['http', 'tcp', AppProtocol.TCP],
    [undefined, 'https', AppProtocol.TLS],
    [undefined, undefined, AppProtocol.UNKNOWN],
  ])('protocol of port %s with appProtocol %s', (name, appProtocol, expected) => {
    expect(appProtocolOf({ ...(name && { name }), ...(appProtocol && { appProtocol }) })).toBe(expected);
  });

  const slice: EndpointSlice = {
    metadata: { name: 'web-1', namespace: 'shop', labels: { 'kubernetes.io/service-name': 'web' } },
    endpoints: [
      { addresses: ['10.0.0.1'], targetRef: { kind: 'Pod', name: 'a', namespace: 'shop' } },
      { addresses: ['192.0.2.7'], nodeName: 'n1' },
      { addresses: ['192.0.2.8'], conditions: { ready: false } },
      { addresses: ['bad'] },
    ],
    ports: [
      { name: 'http-main', port: 8443 },
      { name: 'admin', port: 53, protocol: 'UDP' },
      { name: 'else', port: 1 },
    ],
  };

  test('without a selector: endpoints of slices are pods, or plain addresses', () => {
    const { workload, names } = build({ pods: [pod('a')], services: [service({ ports })], endpointSlices: [slice] });
    expect(workload(UID)?.services?.[KEY]?.ports).toMatchObject([{ servicePort: 80, targetPort: 8443 }]);
    const uid = 'Kubernetes/discovery.k8s.io/EndpointSlice/shop/web-1/192.0.2.7';
    expect(names).toEqual([KEY, uid, uid.replace(/7$/, '8'), UID]);
    expect(workload(uid)).toMatchObject({ networkMode: NetworkMode.HOST_NETWORK, node: 'n1', serviceAccount: '' });
    expect(workload(uid)?.tunnelProtocol ?? 0).toBe(TunnelProtocol.NONE);
    expect(workload(uid)?.authorizationPolicies).toEqual([]);
    expect(workload(uid)?.services?.[KEY]?.ports).toMatchObject([{ servicePort: 80, targetPort: 8443 }]);
    expect(workload(uid.replace(/7$/, '8'))?.status).toBe(WorkloadStatus.UNHEALTHY);
  });

  test('with a selector slices are not asked', () => {
    const found = build({
      pods: [pod('a')],
      services: [service({ selector: { app: 'x' }, ports })],
      endpointSlices: [slice],
    });
    expect(found.names).toEqual([KEY, UID]);
    expect(found.workload(UID)?.services).toEqual({});
  });
});

describe('building again', () => {
  const many = (count: number): Pod[] =>
    Array.from({ length: count }, (_, index) =>
      pod(`p${index}`, {
        metadata: { namespace: `ns${index % 100}`, labels: { app: `a${index % 5}` } },
        status: { podIP: `10.${index >> 16}.${(index >> 8) & 255}.${index & 255}` },
      }),
    );

  test('equal objects give equal versions; one change changes one resource', () => {
    const first = build({ pods: many(100) }).addresses;
    const second = build({ pods: many(100) }).addresses;
    expect([...second.values()].map(({ version }) => version)).toEqual(
      [...first.values()].map(({ version }) => version),
    );
    const pods = many(100);
    pods[7] = pod('p7', { metadata: { namespace: 'ns7', labels: { app: 'a2' } }, status: { podIP: '10.9.9.9' } });
    const changed = [...build({ pods }).addresses.values()].filter((r) => first.get(r.name)?.version !== r.version);
    expect(changed.map(({ name }) => name)).toEqual(['Kubernetes//Pod/ns7/p7']);
  });

  test('20,000 pods with one change are compared, not converted', () => {
    const builder = new ResourceBuilder(options);
    const services = Array.from(
      { length: 2000 },
      (_, index): Service => ({
        metadata: { name: `s${index}`, namespace: `ns${index % 100}` },
        spec: { selector: { app: `a${index % 5}` }, ports: [{ port: 80 }] },
      }),
    );
    const pods = many(20_000);
    const timed = () => {
      const started = performance.now();
      return { addresses: builder.build(objects({ pods, services })).addresses, elapsed: performance.now() - started };
    };
    const first = timed();
    pods[1] = { ...pods[1] } as Pod;
    const second = timed();
    const same = [...second.addresses].filter(([name, resource]) => first.addresses.get(name) === resource).length;
    expect(same).toBe(second.addresses.size - 1);
    expect(second.elapsed).toBeLessThan(first.elapsed / 2);
  });
});

describe('addresses', () => {
  test.each(['10.0.0.01', '10.0.0', '0x0a000001', '167772161', 'fe80::1%eth0', '::g', '', '10.0.0.1/32', '256.0.0.1'])(
    '%j is none',
    (text) => expect(parseIp(text)).toBeUndefined(),
  );
  test('mapped addresses are IPv4', () => expect([...(parseIp('::ffff:1.2.3.4') ?? [])]).toEqual([1, 2, 3, 4]));
  test.each([
    ['10.1.2.3/8', [10, 0, 0, 0], 8],
    ['10.1.2.3', [10, 1, 2, 3], 32],
    ['0.0.0.0/0', [0, 0, 0, 0], 0],
    ['192.168.255.255/17', [192, 168, 128, 0], 17],
  ])('block %s', (text, address, length) => {
    const cidr = parseCidr(text);
    expect([[...(cidr?.address ?? [])], cidr?.length]).toEqual([address, length]);
  });
  test.each(['10.0.0.0/33', '10.0.0.0/', '10.0.0.0/-1', '10.0.0.0/8/8', 'a/8', '::/129', '::ffff:1.2.3.4/24'])(
    '%j is no block',
    (text) => expect(parseCidr(text)).toBeUndefined(),
  );
});
