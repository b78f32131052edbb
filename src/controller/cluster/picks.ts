/**
 * What the controller keeps of each object of the API: the fields that something is made of. The rest, above all managed
 * fields, would be most of the memory, and changes of it would look like changes.
 */
import type { ApiObject } from '../../mesh/api/index.js';
import { REDIRECTION_ANNOTATION, SIDECAR_STATUS_ANNOTATION } from '../../mesh/labels.js';
import { CHECKS, formatPath } from '../../mesh/manifest-checks.js';
import type {
  AuthorizationPolicy,
  EndpointSlice,
  Metadata,
  Namespace,
  Node,
  PeerAuthentication,
  Pod,
  Service,
  ServiceEntry,
  WorkloadEntry,
} from '../objects.js';

type Strings = Readonly<Record<string, string>>;

/**
 * Texts that many objects share (label keys and values, namespaces, node names): JSON.parse makes a new string for each
 * of 50,000 pods. Bounded; what is beyond is simply not shared.
 */
const texts = new Map<string, string>();
const MAX_TEXTS = 20_000;
function share(text: string): string {
  const known = texts.get(text);
  if (known !== undefined) return known;
  if (texts.size < MAX_TEXTS && text.length <= 63) texts.set(text, text);
  return text;
}

function shared(strings: Strings | undefined): Strings | undefined {
  if (strings === undefined) return undefined;
  const copy: Record<string, string> = {};
  for (const key in strings) copy[share(key)] = share(strings[key] ?? '');
  return shareValue(copy);
}

/** Values that are equal in all pods of one template (labels, ports, owner), by their JSON; bounded like the texts. */
const values = new Map<string, object>();
const MAX_VALUES = 20_000;
function shareValue<T extends object>(value: T): T {
  const json = JSON.stringify(value);
  const known = values.get(json);
  // What has the same JSON came from the same function.
  if (known !== undefined) return known as T;
  if (values.size < MAX_VALUES) values.set(json, value);
  return value;
}

/** Without the properties that are undefined, so that equal objects are equal as JSON. */
function compact<T extends object>(object: { readonly [K in keyof T]: T[K] | undefined }): T {
  const copy: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(object)) if (value !== undefined) copy[key] = value;
  return copy as T;
}

function only(strings: Strings | undefined, wanted: readonly string[]): Strings | undefined {
  let found: Record<string, string> | undefined;
  for (const key of wanted) {
    const value = strings?.[key];
    if (value === undefined) continue;
    found ??= {};
    found[key] = value;
  }
  return found;
}

const NAMESPACE_ANNOTATIONS = ['networking.istio.io/traffic-distribution'];
const NODE_LABELS = ['topology.kubernetes.io/region', 'topology.kubernetes.io/zone', 'topology.istio.io/subzone'];
const POD_ANNOTATIONS = [REDIRECTION_ANNOTATION, SIDECAR_STATUS_ANNOTATION];

export function pickNamespace(object: ApiObject): Namespace {
  const { name, labels, annotations } = object.metadata as Metadata;
  return {
    metadata: compact<Metadata>({ name: share(name), labels, annotations: only(annotations, NAMESPACE_ANNOTATIONS) }),
  };
}

/** A Node's kubelet updates it all the time; its place hardly ever changes. */
export function pickNode(object: ApiObject): Node {
  const { name, labels } = object.metadata as Metadata;
  return { metadata: compact<Metadata>({ name: share(name), labels: only(labels, NODE_LABELS) }) };
}

/** The annotation by which manifests tell a network namespace is left out: in a cluster it means nothing. */
export function pickPod(object: ApiObject): Pod {
  const { metadata, spec, status } = object as unknown as Pod;
  const owner = metadata.ownerReferences?.find(({ controller }) => controller === true);
  const named = (containers: NonNullable<Pod['spec']>['containers']) => {
    const kept = (containers ?? [])
      .map(({ ports, restartPolicy }) => ({
        ...(restartPolicy === undefined ? {} : { restartPolicy }),
        ports: (ports ?? [])
          .filter(({ name }) => name !== undefined)
          .map(({ name, containerPort, protocol }) => ({
            name: share(name ?? ''),
            containerPort,
            protocol: protocol ?? 'TCP',
          })),
      }))
      .filter(({ ports }) => ports.length > 0);
    return kept.length > 0 ? shareValue(kept) : undefined;
  };
  // Pods of a cluster that have no conditions yet are not ready; those of a manifest are.
  const ready = status?.conditions?.some(({ type, status }) => type === 'Ready' && status === 'True');
  const ips = status?.podIPs?.map(({ ip }) => ip) ?? [];
  return {
    metadata: compact<Pod['metadata']>({
      name: metadata.name,
      namespace: share(metadata.namespace ?? 'default'),
      uid: metadata.uid,
      generateName: metadata.generateName === undefined ? undefined : share(metadata.generateName),
      labels: shared(metadata.labels),
      annotations: shared(only(metadata.annotations, POD_ANNOTATIONS)),
      deletionTimestamp: metadata.deletionTimestamp,
      ownerReferences: owner && shareValue([{ kind: share(owner.kind), name: share(owner.name), controller: true }]),
    }),
    spec: compact<NonNullable<Pod['spec']>>({
      nodeName: spec?.nodeName === undefined ? undefined : share(spec.nodeName),
      serviceAccountName: spec?.serviceAccountName === undefined ? undefined : share(spec.serviceAccountName),
      hostNetwork: spec?.hostNetwork === true ? true : undefined,
      containers: named(spec?.containers),
      initContainers: named(spec?.initContainers),
    }),
    status: compact<NonNullable<Pod['status']>>({
      phase: status?.phase === undefined ? undefined : share(status.phase),
      podIP: status?.podIP,
      podIPs: ips.length > 1 ? ips.map((ip) => ({ ip })) : undefined,
      conditions: ready ? READY : NOT_READY,
    }),
  };
}
const READY = [{ type: 'Ready', status: 'True' }] as const;
const NOT_READY = [] as const;

export function pickService(object: ApiObject): Service {
  const { metadata, spec } = object as Service;
  return {
    metadata: compact<Metadata>({
      name: metadata.name,
      namespace: share(metadata.namespace ?? 'default'),
      annotations: only(metadata.annotations, NAMESPACE_ANNOTATIONS),
      creationTimestamp: metadata.creationTimestamp,
    }),
    spec: compact<NonNullable<Service['spec']>>({
      type: spec?.type,
      clusterIP: spec?.clusterIP,
      clusterIPs: spec?.clusterIPs,
      selector: shared(spec?.selector),
      ports: spec?.ports,
      ipFamilies: spec?.ipFamilies,
      internalTrafficPolicy: spec?.internalTrafficPolicy,
      trafficDistribution: spec?.trafficDistribution,
      publishNotReadyAddresses: spec?.publishNotReadyAddresses,
    }),
  };
}

export function pickEndpointSlice(object: ApiObject): EndpointSlice {
  const { metadata, addressType, endpoints, ports } = object as EndpointSlice;
  return compact<EndpointSlice>({
    metadata: compact<Metadata>({
      name: metadata.name,
      namespace: share(metadata.namespace ?? 'default'),
      labels: only(metadata.labels, ['kubernetes.io/service-name']),
    }),
    addressType,
    endpoints,
    ports,
  });
}

const policyMetadata = ({ name, namespace, uid, labels, annotations, creationTimestamp }: Metadata): Metadata =>
  compact<Metadata>({
    name,
    namespace,
    uid,
    labels,
    annotations: only(annotations, ['istio.io/dry-run']),
    creationTimestamp,
  });

/** Fields of policies that are unreadable as our types; the server's schema, where it has one, refuses such objects. */
function unreadable(group: string, kind: string, object: object): string | undefined {
  let found: string | undefined;
  CHECKS[`${group}/${kind}`]?.(object, [], (path, message) => {
    found ??= `${formatPath(path)} ${message}`;
  });
  return found;
}

/** What `metadata.generation` says of custom resources, for their status. */
export interface Generation {
  readonly generation?: number;
}

/** An action that none is: the policy refuses everything in its namespace, and says so. */
const UNREADABLE_ACTION = 'unreadable';

export function pickAuthorizationPolicy(object: ApiObject): AuthorizationPolicy {
  const { metadata, spec } = object as AuthorizationPolicy;
  const picked = { metadata: withGeneration(metadata), spec: spec ?? {} };
  const bad = unreadable('security.istio.io', 'AuthorizationPolicy', picked);
  return bad === undefined ? picked : { metadata: picked.metadata, spec: { action: `${UNREADABLE_ACTION}: ${bad}` } };
}

export function pickPeerAuthentication(object: ApiObject): PeerAuthentication {
  const { metadata, spec } = object as PeerAuthentication;
  const picked = { metadata: withGeneration(metadata), spec: spec ?? {} };
  const bad = unreadable('security.istio.io', 'PeerAuthentication', picked);
  // A mode that nobody knows is taken for STRICT.
  if (bad === undefined) return picked;
  return { metadata: picked.metadata, spec: { mtls: { mode: `${UNREADABLE_ACTION}: ${bad}` } } };
}

function withGeneration(metadata: Metadata & Generation): Metadata & Generation {
  const { generation } = metadata;
  return { ...policyMetadata(metadata), ...(generation === undefined ? {} : { generation }) };
}

export function pickServiceEntry(object: ApiObject): ServiceEntry {
  const { metadata, spec, status } = object as ServiceEntry;
  const addresses = status?.addresses;
  return {
    metadata: policyMetadata(metadata),
    spec: spec ?? {},
    ...(addresses === undefined ? {} : { status: { addresses } }),
  };
}

export function pickWorkloadEntry(object: ApiObject): WorkloadEntry {
  const { metadata, spec } = object as WorkloadEntry;
  return {
    metadata: {
      ...policyMetadata(metadata),
      ...compact<Metadata>({ name: metadata.name, annotations: only(metadata.annotations, POD_ANNOTATIONS) }),
    },
    spec: spec ?? {},
  };
}
