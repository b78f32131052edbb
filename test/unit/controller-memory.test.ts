/** What a pod costs the controller: of 50,000 of them every hundred bytes are 5 MB. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { expect, test } from 'vitest';
import { pickNode, pickPod, pickService } from '../../src/controller/cluster/picks.ts';
import type { ClusterObjects, Pod } from '../../src/controller/objects.ts';
import { Places } from '../../src/controller/places.ts';
import { ResourceBuilder } from '../../src/controller/resources.ts';
import { ResourceStore } from '../../src/controller/store.ts';
import type { ApiObject } from '../../src/mesh/api/index.ts';

const PODS = 20_000;
const PODS_PER_SERVICE = 50;
const NODES = 400;
/** Measured: 1,360; 2,160 where texts keep their parts, arrays what they grew by, and each part a table and keys of its own. */
const LIMIT_BYTES = 1500;

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc') as () => void;

function used(): number {
  collect();
  const { heapUsed, arrayBuffers } = process.memoryUsage();
  return heapUsed + arrayBuffers;
}

/** As the API's JSON is read: every text a new one. */
const read = (object: object): ApiObject => JSON.parse(JSON.stringify(object)) as ApiObject;

const serviceOf = (index: number): string => `service-${Math.floor(index / PODS_PER_SERVICE)}`;

function podOf(index: number): ApiObject {
  const service = serviceOf(index);
  const ip = `10.64.${index >> 8}.${index & 255}`;
  return read({
    metadata: {
      name: `${service}-7d4b9c6f5d-${index.toString(36).padStart(5, 'x')}`,
      namespace: 'team-a',
      uid: `00000000-0000-4000-8000-${index.toString().padStart(12, '0')}`,
      generateName: `${service}-7d4b9c6f5d-`,
      labels: { app: service, 'pod-template-hash': '7d4b9c6f5d', 'app.kubernetes.io/version': 'v1' },
      annotations: { 'ambient.istio.io/redirection': 'enabled' },
      ownerReferences: [{ kind: 'ReplicaSet', name: `${service}-7d4b9c6f5d`, controller: true }],
    },
    spec: {
      nodeName: `node-${index % NODES}`,
      serviceAccountName: service,
      containers: [{ ports: [{ name: 'http', containerPort: 8080 }] }],
    },
    status: { phase: 'Running', podIP: ip, podIPs: [{ ip }], conditions: [{ type: 'Ready', status: 'True' }] },
  });
}

test('a pod takes no more than 1,500 bytes, all that is made of it together', () => {
  const nodes = Array.from({ length: NODES }, (_, n) => pickNode(read({ metadata: { name: `node-${n}` } })));
  const services = Array.from({ length: PODS / PODS_PER_SERVICE }, (_, n) =>
    pickService(
      read({
        metadata: { name: `service-${n}`, namespace: 'team-a' },
        spec: {
          selector: { app: `service-${n}` },
          clusterIP: `10.32.0.${n}`,
          ports: [{ port: 80, targetPort: 'http' }],
        },
      }),
    ),
  );
  const before = used();
  const items = new Map<string, Pod>();
  for (let index = 0; index < PODS; index++) {
    const pod = pickPod(podOf(index));
    items.set(`${pod.metadata.namespace}/${pod.metadata.name}`, pod);
  }
  const objects = (): ClusterObjects => ({
    namespaces: [],
    nodes,
    pods: [...items.values()],
    services,
    endpointSlices: [],
    authorizationPolicies: [],
    peerAuthentications: [],
  });
  const builder = new ResourceBuilder({
    clusterId: 'Kubernetes',
    trustDomain: 'cluster.local',
    clusterDomain: 'cluster.local',
    belongsInMesh: () => false,
  });
  const places = new Places();
  const store = new ResourceStore();
  places.replace(objects().pods);
  store.commit(builder.build(objects()).addresses, 1);
  store.trim(1, 0);
  const each = (used() - before) / PODS;
  // All of it has to be there still.
  expect(store.resources.size).toBe(PODS + services.length);
  expect(builder.build(objects(), { namespaces: new Set(), nodes: new Set() }).addresses.size).toBe(
    store.resources.size,
  );
  expect(places.has('node-7', 'team-a', serviceOf(7))).toBe(true);
  expect(items.size).toBe(PODS);
  expect(each).toBeLessThan(LIMIT_BYTES);
  expect(each).toBeGreaterThan(300);
  process.stdout.write(`bytes a pod: ${Math.round(each)}\n`);
});
