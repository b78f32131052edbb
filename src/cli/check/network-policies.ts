/**
 * Whether NetworkPolicies (networking.k8s.io/v1) let HBONE through between pods of the mesh. A CNI that enforces them sees a
 * connection of the mesh as TCP 15008 from pod to pod, whatever port the application asked for. Pure.
 */
import { namespaceOf, type Pod } from '../../mesh/kubernetes.js';
import { HBONE_PORT } from '../../mesh/ports.js';
import { meetsRequirement, type Requirement } from '../../mesh/selector.js';

type Labels = Readonly<Record<string, string>>;

export interface LabelSelector {
  readonly matchLabels?: Labels;
  readonly matchExpressions?: readonly Requirement[];
}

interface PolicyPort {
  readonly protocol?: string;
  readonly port?: number | string;
  readonly endPort?: number;
}

interface PolicyPeer {
  readonly podSelector?: LabelSelector;
  readonly namespaceSelector?: LabelSelector;
  readonly ipBlock?: { readonly cidr: string };
}

interface PolicyRule {
  readonly ports?: readonly PolicyPort[];
  readonly from?: readonly PolicyPeer[];
  readonly to?: readonly PolicyPeer[];
}

export interface NetworkPolicy {
  readonly metadata: { readonly name: string; readonly namespace?: string };
  readonly spec?: {
    readonly podSelector?: LabelSelector;
    readonly policyTypes?: readonly string[];
    readonly ingress?: readonly PolicyRule[];
    readonly egress?: readonly PolicyRule[];
  };
}

/** A pod that policies isolate so that HBONE does not reach or leave it as its other traffic does. */
export interface Blocked {
  /** `namespace/name` */
  readonly pod: string;
  readonly direction: 'ingress' | 'egress';
  /** `all`: no peer may; `some`: peers that other ports are open to may not. */
  readonly what: 'all' | 'some';
  /** `namespace/name` of the policies that isolate it. */
  readonly policies: readonly string[];
}

/** @throws nothing: an operator that is not known matches nothing, as the API server would have refused it */
export function selects(selector: LabelSelector | undefined, labels: Labels = {}): boolean {
  const { matchLabels = {}, matchExpressions = [] } = selector ?? {};
  if (Object.entries(matchLabels).some(([key, value]) => labels[key] !== value)) return false;
  return matchExpressions.every((each) => meetsRequirement(labels, each) ?? false);
}

/** Whether a policy is about this direction: the default is ingress, and egress where it has such rules. */
function isAbout({ spec }: NetworkPolicy, direction: 'ingress' | 'egress'): boolean {
  const types = spec?.policyTypes;
  if (types !== undefined && types.length > 0) return types.some((type) => type.toLowerCase() === direction);
  return direction === 'ingress' || (spec?.egress?.length ?? 0) > 0;
}

/** Whether a rule's ports hold TCP 15008. A port by name is one of a container, and none of those has HBONE's. */
function allowsHbone({ ports }: PolicyRule): boolean {
  if (ports === undefined || ports.length === 0) return true;
  return ports.some(({ protocol = 'TCP', port, endPort }) => {
    if (protocol !== 'TCP') return false;
    if (port === undefined) return true;
    return typeof port === 'number' && port <= HBONE_PORT && HBONE_PORT <= (endPort ?? port);
  });
}

const hasTcp = ({ ports }: PolicyRule): boolean =>
  ports === undefined || ports.length === 0 || ports.some(({ protocol = 'TCP' }) => protocol === 'TCP');

/** Whether the peers of one rule are among those of another, as far as it can be seen without asking for all pods. */
function covers(wide: readonly PolicyPeer[] | undefined, narrow: readonly PolicyPeer[] | undefined): boolean {
  if (wide === undefined || wide.length === 0) return true;
  if (narrow === undefined || narrow.length === 0) return false;
  const known = new Set(wide.map((peer) => canonical(peer)));
  return narrow.every((peer) => known.has(canonical(peer)));
}

/** The same text for the same meaning, whatever the order of keys. */
function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (typeof value !== 'object' || value === null) return JSON.stringify(value);
  const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
  return `{${entries.map(([key, each]) => `${JSON.stringify(key)}:${canonical(each)}`).join()}}`;
}

/** Peers by address are none of pods in the mesh: what is outside of it does not speak HBONE. */
const ofPods = (peers: readonly PolicyPeer[] | undefined): boolean =>
  peers === undefined || peers.length === 0 || peers.some(({ ipBlock }) => ipBlock === undefined);

/**
 * Pods of the mesh that cannot speak HBONE as their policies let them speak otherwise.
 * @param pods of the mesh only
 */
export function blockedPods(policies: readonly NetworkPolicy[], pods: readonly Pod[]): Blocked[] {
  const blocked: Blocked[] = [];
  for (const pod of pods) {
    for (const direction of ['ingress', 'egress'] as const) {
      const isolating = policies.filter(
        (policy) =>
          isAbout(policy, direction) &&
          (policy.metadata.namespace ?? 'default') === namespaceOf(pod) &&
          selects(policy.spec?.podSelector, pod.metadata.labels),
      );
      if (isolating.length === 0) continue;
      const rules = isolating.flatMap(({ spec }) => spec?.[direction] ?? []);
      const peersOf = (rule: PolicyRule): readonly PolicyPeer[] | undefined =>
        direction === 'ingress' ? rule.from : rule.to;
      const open = rules.filter(allowsHbone);
      const needed = rules.filter((rule) => hasTcp(rule) && ofPods(peersOf(rule)) && !allowsHbone(rule));
      // Who lets nothing in at all means it so.
      if (!rules.some((rule) => hasTcp(rule) && ofPods(peersOf(rule)))) continue;
      const missing = needed.filter((rule) => !open.some((other) => covers(peersOf(other), peersOf(rule))));
      if (missing.length === 0) continue;
      blocked.push({
        pod: `${namespaceOf(pod)}/${pod.metadata.name}`,
        direction,
        what: open.some((rule) => ofPods(peersOf(rule))) ? 'some' : 'all',
        policies: isolating.map(({ metadata }) => `${metadata.namespace ?? 'default'}/${metadata.name}`),
      });
    }
  }
  return blocked;
}
