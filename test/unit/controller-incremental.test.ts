/** Changes that are built one by one lead to what building everything at once leads to, whatever they are. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { ClusterObjects, Pod } from '../../src/controller/objects.ts';
import { type BuilderOptions, type Dirty, ResourceBuilder } from '../../src/controller/resources.ts';
import { ResourceStore } from '../../src/controller/store.ts';

const OPTIONS: BuilderOptions = {
  clusterId: 'Kubernetes',
  trustDomain: 'cluster.local',
  clusterDomain: 'cluster.local',
  belongsInMesh: () => false,
};
const SPACES = ['a', 'b', 'istio-system'];
const NAMES = ['x', 'y', 'z'];
const APPS = ['web', 'db'];
const NODES = ['n1', 'n2'];

type Mutable = { -readonly [K in keyof Required<ClusterObjects>]: Map<string, Required<ClusterObjects>[K][number]> };
type Kind = keyof Mutable;

/** A change: an object of a kind is put, with some content, or removed. */
const change = fc.record({
  kind: fc.constantFrom<Kind>(
    'pods',
    'pods',
    'pods',
    'services',
    'endpointSlices',
    'authorizationPolicies',
    'peerAuthentications',
    'serviceEntries',
    'workloadEntries',
    'nodes',
  ),
  namespace: fc.constantFrom(...SPACES),
  name: fc.constantFrom(...NAMES),
  app: fc.constantFrom(...APPS),
  node: fc.constantFrom(...NODES),
  number: fc.integer({ min: 1, max: 250 }),
  remove: fc.boolean(),
  flag: fc.boolean(),
});
type Change = typeof change extends fc.Arbitrary<infer T> ? T : never;

function make({ kind, namespace, name, app, node, number, flag }: Change): object {
  const metadata = { name, namespace, uid: `${namespace}-${name}`, labels: { app } };
  switch (kind) {
    case 'pods':
      return {
        metadata: { ...metadata, annotations: flag ? { 'ambient.istio.io/redirection': 'enabled' } : {} },
        spec: {
          nodeName: node,
          serviceAccountName: app,
          containers: [{ ports: [{ name: 'web', containerPort: number }] }],
        },
        status: { podIP: `10.0.0.${number}`, conditions: [] },
      };
    case 'services':
      return {
        metadata,
        spec: {
          ...(flag ? { selector: { app } } : {}),
          clusterIP: `10.1.0.${number}`,
          ports: [{ name: 'p', port: number, targetPort: 'web' }],
        },
      };
    case 'endpointSlices':
      return {
        metadata: { ...metadata, labels: { 'kubernetes.io/service-name': name } },
        endpoints: [flag ? { targetRef: { kind: 'Pod', name } } : { addresses: [`192.0.2.${number}`] }],
        ports: [{ name: 'p', port: number }],
      };
    case 'authorizationPolicies':
      return {
        metadata,
        spec: {
          ...(flag ? { selector: { matchLabels: { app } } } : {}),
          rules: [{ to: [{ operation: { ports: [String(number)] } }] }],
        },
      };
    case 'peerAuthentications':
      return {
        metadata,
        spec: {
          ...(flag ? { selector: { matchLabels: { app } }, portLevelMtls: { [number]: { mode: 'PERMISSIVE' } } } : {}),
          mtls: { mode: number % 2 === 0 ? 'STRICT' : 'PERMISSIVE' },
        },
      };
    case 'serviceEntries':
      return {
        metadata,
        spec: {
          hosts: [`${name}.example`],
          addresses: [`240.0.0.${number}`],
          ports: [{ number, name: 'web' }],
          resolution: 'STATIC',
          ...(flag ? { workloadSelector: { labels: { app } } } : { endpoints: [{ address: `192.0.3.${number}` }] }),
        },
      };
    case 'workloadEntries':
      return { metadata, spec: { address: `192.0.4.${number}`, labels: { app } } };
    default:
      return { metadata: { name: node, labels: { 'topology.kubernetes.io/region': `r${number}` } } };
  }
}

/** As the source of a cluster tells it. */
function dirtyOf({ kind, namespace, node }: Change): Dirty | undefined {
  if (kind === 'nodes') return { namespaces: new Set(), nodes: new Set([node]) };
  return namespace === 'istio-system' ? undefined : { namespaces: new Set([namespace]), nodes: new Set() };
}

test('incremental builds equal whole ones', () => {
  fc.assert(
    fc.property(fc.array(change, { minLength: 1, maxLength: 60 }), (changes) => {
      const kinds: readonly Kind[] = [
        'namespaces',
        'nodes',
        'pods',
        'services',
        'endpointSlices',
        'authorizationPolicies',
        'peerAuthentications',
        'serviceEntries',
        'workloadEntries',
      ];
      const maps = Object.fromEntries(kinds.map((kind) => [kind, new Map()])) as unknown as Mutable;
      const objects = (): ClusterObjects =>
        Object.fromEntries(kinds.map((kind) => [kind, [...maps[kind].values()]])) as unknown as ClusterObjects;
      const builder = new ResourceBuilder(OPTIONS);
      const store = new ResourceStore();
      store.commit(builder.build(objects()).addresses, 1);
      let generation = 1;
      for (const one of changes) {
        const key = one.kind === 'nodes' ? one.node : `${one.namespace}/${one.name}`;
        const map = maps[one.kind] as Map<string, object>;
        if (one.remove) map.delete(key);
        else map.set(key, make(one));
        generation++;
        if (one.kind === 'pods') {
          store.commitDelta(builder.update(new Map([[key, maps.pods.get(key) as Pod | undefined]])), generation);
        } else store.commit(builder.build(objects(), dirtyOf(one)).addresses, generation);
        const whole = new ResourceBuilder(OPTIONS).build(objects()).addresses;
        const versions = (resources: ReadonlyMap<string, { readonly version: string }>): string[] =>
          [...resources].map(([name, { version }]) => `${name} ${version}`).sort();
        expect(versions(store.resources)).toEqual(versions(whole));
      }
    }),
    { numRuns: 60 },
  );
});

test('a store tells of a delta what it tells of a whole state', () => {
  const resource = (name: string, version: string) => ({ name, version, value: new Uint8Array(), aliases: [] });
  const store = new ResourceStore();
  store.commit(
    new Map([
      ['a', resource('a', '1')],
      ['b', resource('b', '1')],
    ]),
    1,
  );
  expect(store.commitDelta({ upserts: [resource('a', '2'), resource('b', '1')], removals: ['c'] }, 2)).toBe(1);
  expect(store.changesSince(1)).toMatchObject({ upserts: [{ name: 'a', version: '2' }], removals: [] });
  expect(store.commitDelta({ upserts: [], removals: ['b'] }, 3)).toBe(1);
  expect(store.changesSince(1)).toMatchObject({ upserts: [{ name: 'a' }], removals: ['b'] });
  expect(store.changesSince(3)).toMatchObject({ upserts: [], removals: [] });
  expect([...store.resources.keys()]).toEqual(['a']);
});
