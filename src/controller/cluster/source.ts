/** The Kubernetes API as the controller's source of objects. */
import { type Api, type ApiObject, Watched, type WatchedCounters, type WatchedOptions } from '../../mesh/api/index.js';
import { ROOT_NAMESPACE } from '../../mesh/labels.js';
import type { Logger } from '../../mesh/log.js';
import type { ObjectSource, SourceChange } from '../controller.js';
import type { ClusterObjects, Pod } from '../objects.js';
import type { PodChanges } from '../resources.js';
import {
  pickAuthorizationPolicy,
  pickEndpointSlice,
  pickNamespace,
  pickNode,
  pickPeerAuthentication,
  pickPod,
  pickService,
  pickServiceEntry,
  pickWorkloadEntry,
} from './picks.js';

/** Pods that have ended run nothing and have no address of their own any more: the server leaves them out. */
const LIVE_PODS = 'status.phase!=Succeeded,status.phase!=Failed';
/**
 * Slices that Kubernetes makes of a Service's selector say nothing that the pods themselves do not, and are most of all
 * slices. (What such a controller left behind of a Service that lost its selector is therefore not seen.)
 */
const OTHER_SLICES = 'endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io';

type Resource<T> = Pick<WatchedOptions<T>, 'path' | 'optional' | 'fieldSelector' | 'labelSelector'> & {
  pick(object: ApiObject): T;
};
type Element<L> = NonNullable<L> extends readonly (infer T)[] ? T : never;
type Resources = { readonly [K in keyof Required<ClusterObjects>]: Resource<Element<ClusterObjects[K]>> };

/** Policies at the version that every Istio since 1.21 serves; our chart's definitions serve it too. */
const RESOURCES: Resources = {
  namespaces: { path: '/api/v1/namespaces', pick: pickNamespace },
  nodes: { path: '/api/v1/nodes', pick: pickNode },
  pods: { path: '/api/v1/pods', pick: pickPod, fieldSelector: LIVE_PODS },
  services: { path: '/api/v1/services', pick: pickService },
  endpointSlices: {
    path: '/apis/discovery.k8s.io/v1/endpointslices',
    pick: pickEndpointSlice,
    labelSelector: OTHER_SLICES,
  },
  authorizationPolicies: {
    path: '/apis/security.istio.io/v1/authorizationpolicies',
    pick: pickAuthorizationPolicy,
    optional: true,
  },
  peerAuthentications: {
    path: '/apis/security.istio.io/v1/peerauthentications',
    pick: pickPeerAuthentication,
    optional: true,
  },
  serviceEntries: { path: '/apis/networking.istio.io/v1/serviceentries', pick: pickServiceEntry, optional: true },
  workloadEntries: { path: '/apis/networking.istio.io/v1/workloadentries', pick: pickWorkloadEntry, optional: true },
};

export interface ClusterSource extends ObjectSource {
  /** A pod that has not ended, by `namespace/name`. */
  pod(key: string): Pod | undefined;
  namespaces(): Iterable<string>;
  /** The status of a policy as the API last told it; it is no part of the object, because we write it ourselves. */
  statusOf(object: object): unknown;
  onStatusChange(changed: () => void): void;
  counters(): Readonly<Record<string, Readonly<WatchedCounters>>>;
}

/** @param times of each watch, for tests */
export function clusterSource(api: Api, log: Logger, times?: WatchedOptions<unknown>['times']): ClusterSource {
  let listener: ((objects: ClusterObjects, change?: SourceChange) => void) | undefined;
  let statusListener: (() => void) | undefined;
  const statuses = new Map<string, string>();
  const arrays = new Map<string, readonly unknown[]>();
  /** Keeps the status of what `pick` reduces, by UID. */
  const noting = <T>(pick: (object: ApiObject) => T) => {
    return (object: ApiObject): T => {
      const { uid } = object.metadata as { readonly uid?: string };
      const status = JSON.stringify((object as { readonly status?: unknown }).status ?? {});
      if (uid !== undefined && statuses.get(uid) !== status) {
        statuses.set(uid, status);
        // Later: whoever listens looks at the list, which has not got the object yet.
        setImmediate(() => statusListener?.());
      }
      return pick(object);
    };
  };
  const watch = <K extends keyof Resources>(kind: K): Watched<Element<ClusterObjects[K]>> => {
    type T = Element<ClusterObjects[K]>;
    const options = RESOURCES[kind] as unknown as Resource<T>;
    const stated = kind === 'authorizationPolicies' || kind === 'peerAuthentications';
    const watched: Watched<T> = new Watched<T>({
      api,
      log,
      times,
      ...options,
      pick: stated ? noting(options.pick) : options.pick,
      changed(keys) {
        arrays.delete(kind);
        listener?.(objects, kind === 'pods' ? { pods: podChanges(keys) } : changeOf(kind, keys));
      },
    });
    return watched;
  };
  const lists = {
    namespaces: watch('namespaces'),
    nodes: watch('nodes'),
    pods: watch('pods'),
    services: watch('services'),
    endpointSlices: watch('endpointSlices'),
    authorizationPolicies: watch('authorizationPolicies'),
    peerAuthentications: watch('peerAuthentications'),
    serviceEntries: watch('serviceEntries'),
    workloadEntries: watch('workloadEntries'),
  };
  const podChanges = (keys: readonly string[]): PodChanges =>
    new Map(keys.map((key) => [key, lists.pods.items().get(key)]));
  const array = <K extends keyof Resources>(kind: K): readonly Element<ClusterObjects[K]>[] => {
    let list = arrays.get(kind);
    if (list === undefined) {
      list = [...lists[kind].items().values()];
      arrays.set(kind, list);
    }
    return list as readonly Element<ClusterObjects[K]>[];
  };
  // Always the state of now: whoever gathers changes for a while must not build what is over already.
  const objects: Required<ClusterObjects> = {
    get namespaces() {
      return array('namespaces');
    },
    get nodes() {
      return array('nodes');
    },
    get pods() {
      return [...lists.pods.items().values()];
    },
    get services() {
      return array('services');
    },
    get endpointSlices() {
      return array('endpointSlices');
    },
    get authorizationPolicies() {
      return array('authorizationPolicies');
    },
    get peerAuthentications() {
      return array('peerAuthentications');
    },
    get serviceEntries() {
      return array('serviceEntries');
    },
    get workloadEntries() {
      return array('workloadEntries');
    },
  };
  const all = Object.values(lists) as readonly Watched<unknown>[];
  return {
    async start(changed) {
      log.info({ event: 'cluster_reading', access: api.description }, 'reading the objects of the cluster');
      await Promise.all(all.map((watched) => watched.start()));
      listener = changed;
      return objects;
    },
    locate: () => undefined,
    async close() {
      await Promise.all(all.map((watched) => watched.close()));
    },
    pod: (key) => lists.pods.items().get(key),
    namespaces: () => lists.namespaces.items().keys(),
    statusOf(object) {
      const { uid } = (object as ClusterObjects['authorizationPolicies'][number]).metadata;
      return JSON.parse(statuses.get(uid ?? '') ?? '{}');
    },
    onStatusChange(changed) {
      statusListener = changed;
    },
    counters: () => Object.fromEntries(Object.entries(lists).map(([kind, watched]) => [kind, watched.counters])),
  };
}

const NOWHERE: ReadonlySet<string> = new Set();

/** Which pods a change of something else may concern; undefined for all of them. */
function changeOf(kind: keyof Resources, keys: readonly string[]): SourceChange | undefined {
  if (kind === 'nodes') return { dirty: { namespaces: NOWHERE, nodes: new Set(keys) } };
  const namespaces = new Set(keys.map((key) => key.split('/')[0] ?? ''));
  // What stands in the root namespace is about the whole mesh.
  return namespaces.has(ROOT_NAMESPACE) ? undefined : { dirty: { namespaces, nodes: NOWHERE } };
}
