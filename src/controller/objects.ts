/** Small questions about Kubernetes objects, and what is said of those that cannot be used as written. */
import { type Metadata, namespaceOf } from '../mesh/kubernetes.js';

type Labels = Readonly<Record<string, string>>;

export type {
  Attributes,
  AuthorizationPolicy,
  AuthorizationRule,
  EndpointSlice,
  Metadata,
  Namespace,
  Node,
  ObjectSet as ClusterObjects,
  PeerAuthentication,
  Pod,
  Service,
  ServiceEntry,
  ServicePort,
  WorkloadEntry,
  WorkloadEntrySpec,
} from '../mesh/kubernetes.js';
export { namespaceOf, serviceAccountOf } from '../mesh/kubernetes.js';

/** Something about an object that the user should know; `message` says what follows from it. */
export interface Problem {
  /** `AuthorizationPolicy team/allow-web`. */
  readonly object: string;
  readonly message: string;
  /** The object itself, by which a source knows the file. */
  readonly source?: object;
}

/** `namespace/name`. */
export function keyOf(object: { readonly metadata: Metadata }): string {
  return `${namespaceOf(object)}/${object.metadata.name}`;
}

/**
 * The parts as one text that is kept for long. A template string keeps its parts and every step on the way, which is
 * three times as much; a text that is used once is better made by one.
 */
export function flat(...parts: readonly string[]): string {
  return parts.join('');
}

/** Whether all wanted labels are there; no wanted labels match everything. */
export function matchesLabels(wanted: Labels, labels: Labels | undefined): boolean {
  for (const key in wanted) if (labels?.[key] !== wanted[key]) return false;
  return true;
}

/** Oldest first, as precedence between policies wants it; what has no timestamp is youngest; ties by name. */
export function byAge(a: { readonly metadata: Metadata }, b: { readonly metadata: Metadata }): number {
  const left = a.metadata.creationTimestamp ?? '\uffff';
  const right = b.metadata.creationTimestamp ?? '\uffff';
  if (left !== right) return left < right ? -1 : 1;
  return a.metadata.name < b.metadata.name ? -1 : 1;
}
