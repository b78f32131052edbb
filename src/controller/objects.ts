/** The Kubernetes objects that the controller reads, as far as it reads them, and the set it builds from. */

type Labels = Readonly<Record<string, string>>;

export interface Metadata {
  readonly name: string;
  readonly namespace?: string;
  readonly generateName?: string;
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

interface ContainerPort {
  readonly name?: string;
  readonly containerPort: number;
  readonly protocol?: string;
}

interface Container {
  readonly ports?: readonly ContainerPort[];
  readonly restartPolicy?: string;
}

export interface Namespace {
  readonly metadata: Metadata;
}

export interface Node {
  readonly metadata: Metadata;
}

export interface Pod {
  readonly metadata: Metadata;
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

/** All objects of a cluster. */
export interface ClusterObjects {
  readonly namespaces: readonly Namespace[];
  readonly nodes: readonly Node[];
  readonly pods: readonly Pod[];
  readonly services: readonly Service[];
  readonly endpointSlices: readonly EndpointSlice[];
  readonly authorizationPolicies: readonly AuthorizationPolicy[];
  readonly peerAuthentications: readonly PeerAuthentication[];
}

/** Something about an object that the user should know; `message` says what follows from it. */
export interface Problem {
  /** `AuthorizationPolicy team/allow-web`. */
  readonly object: string;
  readonly message: string;
  /** The object itself, by which a source knows the file. */
  readonly source?: object;
}

/** Namespace of an object, `default` where it names none. */
export function namespaceOf(object: { readonly metadata: Metadata }): string {
  return object.metadata.namespace ?? 'default';
}

/** `namespace/name`. */
export function keyOf(object: { readonly metadata: Metadata }): string {
  return `${namespaceOf(object)}/${object.metadata.name}`;
}

/** Service account of a pod; what Kubernetes' admission fills in where a manifest has none. */
export function serviceAccountOf(pod: Pod): string {
  return pod.spec?.serviceAccountName || 'default';
}

/** Whether all wanted labels are there; no wanted labels match everything. */
export function matchesLabels(wanted: Labels, labels: Labels | undefined): boolean {
  for (const key in wanted) if (labels?.[key] !== wanted[key]) return false;
  return true;
}

/** Groups by namespace. */
export function byNamespace<T extends { readonly metadata: Metadata }>(objects: readonly T[]): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const object of objects) {
    const namespace = namespaceOf(object);
    const group = groups.get(namespace);
    if (group === undefined) groups.set(namespace, [object]);
    else group.push(object);
  }
  return groups;
}

/** Oldest first, as precedence between policies wants it; what has no timestamp is youngest; ties by name. */
export function byAge(a: { readonly metadata: Metadata }, b: { readonly metadata: Metadata }): number {
  const left = a.metadata.creationTimestamp ?? '\uffff';
  const right = b.metadata.creationTimestamp ?? '\uffff';
  if (left !== right) return left < right ? -1 : 1;
  return a.metadata.name < b.metadata.name ? -1 : 1;
}
