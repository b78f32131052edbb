/** Values that tests of the engine's binding start from. */
import type { EngineOptions, EngineService, EngineWorkload, StateDelta } from '../../../src/proxy/engine.js';

export const options: EngineOptions = {
  workers: 2,
  nodeName: 'node-1',
  network: '',
  clusterId: 'Kubernetes',
  streamWindow: 4 << 20,
  connectionWindow: 16 << 20,
  frameSize: 1 << 20,
  maxStreamsPerConnection: 100,
  poolIdleMs: 300_000,
};

export const workload: EngineWorkload = {
  uid: 'Kubernetes//Pod/shop/web',
  name: 'web',
  namespace: 'shop',
  addresses: [Uint8Array.of(10, 0, 0, 1)],
  hostname: '',
  network: '',
  hbone: true,
  trustDomain: 'cluster.local',
  serviceAccount: 'web',
  waypoint: { hostname: { namespace: 'shop', hostname: 'gate.shop' }, hboneMtlsPort: 15008 },
  node: 'node-1',
  canonicalName: 'web',
  canonicalRevision: 'v1',
  workloadName: 'web',
  workloadType: 'deployment',
  applicationTunnel: { proxy: false, port: 0 },
  services: [{ key: 'shop/web.shop', ports: [{ servicePort: 80, targetPort: 8080 }] }],
  authorizationPolicies: ['shop/only-me'],
  healthy: true,
  clusterId: 'Kubernetes',
  locality: { region: '', zone: '', subzone: '' },
  hostNetwork: false,
  capacity: 1,
};

export const service: EngineService = {
  name: 'web',
  namespace: 'shop',
  hostname: 'web.shop',
  vips: [{ network: '', address: Uint8Array.of(10, 96, 0, 1) }],
  ports: [{ servicePort: 80, targetPort: 8080 }],
  subjectAltNames: [],
  weightedWaypoints: [
    { destination: { address: { network: '', address: new Uint8Array(16) }, hboneMtlsPort: 1 }, weight: 1 },
  ],
  routingPreference: [1, 2],
  mode: 2,
  allowUnhealthy: false,
  ipFamilies: 0,
  canonical: true,
  namespaceVisibility: false,
};

export const delta: StateDelta = {
  workloads: [workload],
  services: [service],
  policies: [
    {
      name: 'only-me',
      namespace: 'shop',
      scope: 'workload',
      action: 'allow',
      dryRun: false,
      rules: [
        [
          [
            {
              namespaces: { anyOf: [{ kind: 'exact', value: 'shop' }], noneOf: [] },
              principals: { anyOf: [], noneOf: [{ kind: 'presence', value: '' }] },
              sourceIps: { anyOf: [{ address: Uint8Array.of(10, 0, 0, 0), length: 8 }], noneOf: [] },
              destinationIps: { anyOf: [], noneOf: [{ address: new Uint8Array(16), length: 128 }] },
              destinationPorts: { anyOf: [80], noneOf: [99999] },
              serviceAccounts: { anyOf: [{ namespace: 'shop', serviceAccount: 'me' }], noneOf: [] },
              malformed: false,
            },
          ],
        ],
      ],
    },
  ],
  removedAddresses: ['gone'],
  removedPolicies: ['shop/gone'],
};
