/** The Kubernetes objects that agent and controller read, as far as they read them; everything else in them is ignored. */
import { createHash } from 'node:crypto';

type Labels = Readonly<Record<string, string>>;

export interface Metadata {
  readonly name: string;
  /** Absent on cluster-wide objects, and where a manifest leaves it to its reader: {@link namespaceOf}. */
  readonly namespace?: string;
  readonly generateName?: string;
  /** Kubernetes' own, or derived for a Pod without one: {@link derivedUid}. */
  readonly uid?: string;
  readonly labels?: Labels;
  readonly annotations?: Labels;
  readonly creationTimestamp?: string;
  readonly deletionTimestamp?: string;
  readonly ownerReferences?: readonly {
    readonly kind: string;
    readonly name: string;
    readonly controller?: boolean;
  }[];
}

export interface Namespace {
  readonly metadata: Metadata;
}

export interface Node {
  readonly metadata: Metadata;
}

export interface Container {
  readonly ports?: readonly {
    readonly name?: string;
    readonly containerPort: number;
    readonly protocol?: string;
  }[];
  readonly restartPolicy?: string;
}

export interface Pod {
  readonly metadata: Metadata & { readonly uid: string };
  readonly spec?: {
    readonly nodeName?: string;
    readonly serviceAccountName?: string;
    readonly hostNetwork?: boolean;
    readonly containers?: readonly Container[];
    readonly initContainers?: readonly Container[];
  };
  readonly status?: {
    readonly phase?: string;
    readonly podIP?: string;
    readonly podIPs?: readonly { readonly ip: string }[];
    readonly conditions?: readonly { readonly type: string; readonly status: string }[];
  };
}

export interface ServicePort {
  readonly name?: string;
  readonly port: number;
  readonly targetPort?: number | string;
  readonly protocol?: string;
  readonly appProtocol?: string;
}

export interface Service {
  readonly metadata: Metadata;
  readonly spec?: {
    readonly type?: string;
    readonly clusterIP?: string;
    readonly clusterIPs?: readonly string[];
    readonly selector?: Labels;
    readonly ports?: readonly ServicePort[];
    readonly ipFamilies?: readonly string[];
    readonly internalTrafficPolicy?: string;
    readonly trafficDistribution?: string;
    readonly publishNotReadyAddresses?: boolean;
  };
}

export interface EndpointSlice {
  readonly metadata: Metadata;
  readonly addressType?: string;
  readonly endpoints?: readonly {
    readonly addresses?: readonly string[];
    readonly conditions?: { readonly ready?: boolean };
    readonly nodeName?: string;
    readonly zone?: string;
    readonly targetRef?: { readonly kind?: string; readonly name?: string; readonly namespace?: string };
  }[];
  readonly ports?: readonly {
    readonly name?: string;
    readonly port?: number;
    readonly protocol?: string;
  }[];
}

export interface WorkloadSelector {
  readonly matchLabels?: Labels;
}

export interface PeerAuthentication {
  readonly metadata: Metadata;
  readonly spec?: {
    readonly selector?: WorkloadSelector;
    readonly mtls?: { readonly mode?: string };
    readonly portLevelMtls?: Readonly<Record<string, { readonly mode?: string }>>;
  };
}

/** Lists of strings by field name (`principals`, `notPrincipals`, `ports`, ...). */
export type Attributes = Readonly<Record<string, readonly string[] | undefined>>;

export interface AuthorizationRule {
  readonly from?: readonly { readonly source?: Attributes }[];
  readonly to?: readonly { readonly operation?: Attributes }[];
  readonly when?: readonly {
    readonly key: string;
    readonly values?: readonly string[];
    readonly notValues?: readonly string[];
  }[];
}

export interface AuthorizationPolicy {
  readonly metadata: Metadata;
  readonly spec?: {
    readonly selector?: WorkloadSelector;
    readonly targetRef?: unknown;
    readonly targetRefs?: readonly unknown[];
    readonly action?: string;
    readonly rules?: readonly AuthorizationRule[];
  };
}

/** Port of a ServiceEntry. */
export interface ServiceEntryPort {
  readonly number: number;
  readonly name?: string;
  readonly protocol?: string;
  readonly targetPort?: number;
}

/** Spec of a WorkloadEntry, and an endpoint that stands in a ServiceEntry. */
export interface WorkloadEntrySpec {
  readonly address?: string;
  /** Target port by the name of the service's port. */
  readonly ports?: Readonly<Record<string, number>>;
  readonly labels?: Labels;
  readonly network?: string;
  /** `region/zone/subzone`. */
  readonly locality?: string;
  readonly weight?: number;
  readonly serviceAccount?: string;
}

export interface WorkloadEntry {
  readonly metadata: Metadata;
  readonly spec?: WorkloadEntrySpec;
}

export interface ServiceEntry {
  readonly metadata: Metadata;
  readonly spec?: {
    readonly hosts?: readonly string[];
    readonly addresses?: readonly string[];
    readonly ports?: readonly ServiceEntryPort[];
    readonly resolution?: string;
    readonly endpoints?: readonly WorkloadEntrySpec[];
    readonly workloadSelector?: { readonly labels?: Labels };
    readonly exportTo?: readonly string[];
    readonly subjectAltNames?: readonly string[];
  };
  readonly status?: { readonly addresses?: readonly { readonly value?: string; readonly host?: string }[] };
}

/** All objects of a source at one moment. An object that did not change is the same JavaScript object as before. */
export interface ObjectSet {
  readonly namespaces: readonly Namespace[];
  readonly nodes: readonly Node[];
  readonly pods: readonly Pod[];
  readonly services: readonly Service[];
  readonly endpointSlices: readonly EndpointSlice[];
  readonly authorizationPolicies: readonly AuthorizationPolicy[];
  readonly peerAuthentications: readonly PeerAuthentication[];
  /** Absent where the source has no such kind. */
  readonly serviceEntries?: readonly ServiceEntry[];
  readonly workloadEntries?: readonly WorkloadEntry[];
}

/** Namespace of a namespaced object, `default` where it names none. */
export function namespaceOf(object: { readonly metadata: Metadata }): string {
  return object.metadata.namespace ?? 'default';
}

/** Service account of a pod; Kubernetes' admission fills in `default` where a manifest has none. */
export function serviceAccountOf(pod: Pod): string {
  return pod.spec?.serviceAccountName || 'default';
}

/** The pod's addresses as text, in the order of the status; empty while it has none. */
export function addressesOf(pod: Pod): string[] {
  const many = pod.status?.podIPs ?? [];
  const single = pod.status?.podIP === undefined || pod.status.podIP === '' ? [] : [pod.status.podIP];
  return many.length > 0 ? many.map(({ ip }) => ip) : single;
}

/** UID of a pod whose manifest has none: always the same for the same namespace and name, of a UUID's shape. */
export function derivedUid(namespace: string, name: string): string {
  const hash = createHash('sha256').update(`${namespace}/${name}`).digest('hex');
  // Version 8 ("of one's own making", RFC 9562) and the RFC's variant.
  const variant = ((Number.parseInt(hash.charAt(16), 16) & 0x3) | 0x8).toString(16);
  return [
    hash.slice(0, 8),
    hash.slice(8, 12),
    `8${hash.slice(13, 16)}`,
    variant + hash.slice(17, 20),
    hash.slice(20, 32),
  ].join('-');
}
