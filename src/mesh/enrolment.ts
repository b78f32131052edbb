/** Decides whether a pod belongs in the mesh, by the rules of Istio ambient's node agent. Pure; agent and controller agree by it. */
import { addressesOf, type Namespace, namespaceOf, type Pod } from './kubernetes.js';
import {
  DATAPLANE_MODE_AMBIENT,
  DATAPLANE_MODE_LABEL,
  DATAPLANE_MODE_NONE,
  EXCLUDED_NAMESPACES,
  SIDECAR_STATUS_ANNOTATION,
} from './labels.js';

/** Why a pod is not in the mesh; the text is part of the status that people and programs read. */
export type NotEnrolledReason =
  | 'not labelled'
  | 'pod opts out by label'
  | 'uses the network of the node (hostNetwork)'
  | 'has a sidecar'
  | 'namespace is excluded'
  | 'has ended'
  | 'has no address yet';

export type Enrolment = { readonly enrol: true } | { readonly enrol: false; readonly reason: NotEnrolledReason };

const TERMINAL_PHASES: readonly string[] = ['Succeeded', 'Failed'];

const no = (reason: NotEnrolledReason): Enrolment => ({ enrol: false, reason });

/**
 * Whether a pod belongs in the mesh. The pod's label beats its namespace's in both directions; any value of the pod's label
 * but `ambient` and `none` leaves the choice to the namespace, and an unknown namespace has chosen nothing.
 * @param excludedNamespaces namespaces whose pods are never captured, whatever they are labelled
 */
export function decideEnrolment(
  pod: Pod,
  namespace: Namespace | undefined,
  excludedNamespaces: readonly string[] = EXCLUDED_NAMESPACES,
): Enrolment {
  const own = pod.metadata.labels?.[DATAPLANE_MODE_LABEL];
  if (own === DATAPLANE_MODE_NONE) return no('pod opts out by label');
  const inherited = namespace?.metadata.labels?.[DATAPLANE_MODE_LABEL];
  if (own !== DATAPLANE_MODE_AMBIENT && inherited !== DATAPLANE_MODE_AMBIENT) return no('not labelled');
  if (excludedNamespaces.includes(namespaceOf(pod))) return no('namespace is excluded');
  if (pod.spec?.hostNetwork === true) return no('uses the network of the node (hostNetwork)');
  if (pod.metadata.annotations?.[SIDECAR_STATUS_ANNOTATION] !== undefined) return no('has a sidecar');
  if (TERMINAL_PHASES.includes(pod.status?.phase ?? '')) return no('has ended');
  if (addressesOf(pod).length === 0) return no('has no address yet');
  return { enrol: true };
}
