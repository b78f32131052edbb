/** Whether a DaemonSet still wants a node: by its nodeSelector and required node affinity, as Kubernetes' own controller decides. */
import type { Metadata } from '../mesh/kubernetes.js';
import { meetsRequirement, type Requirement } from '../mesh/selector.js';

interface Term {
  readonly matchExpressions?: readonly Requirement[];
  readonly matchFields?: readonly Requirement[];
}

/** Of a pod's spec, what chooses nodes. */
export interface NodeChoice {
  readonly nodeSelector?: Readonly<Record<string, string>>;
  readonly affinity?: {
    readonly nodeAffinity?: {
      readonly requiredDuringSchedulingIgnoredDuringExecution?: { readonly nodeSelectorTerms?: readonly Term[] };
    };
  };
}

/**
 * Taints are not looked at: the chart's DaemonSet tolerates all, and one that does not is not sent away by NoSchedule.
 * @param node as the API has it
 */
export function isWantedOn(choice: NodeChoice, node: { readonly metadata: Metadata }): boolean {
  const { labels = {}, name } = node.metadata;
  for (const [key, value] of Object.entries(choice.nodeSelector ?? {})) if (labels[key] !== value) return false;
  const required = choice.affinity?.nodeAffinity?.requiredDuringSchedulingIgnoredDuringExecution;
  if (required === undefined) return true;
  // One of the terms, and all of it; a term that asks for nothing matches nothing.
  return (required.nodeSelectorTerms ?? []).some(({ matchExpressions = [], matchFields = [] }) => {
    if (matchExpressions.length + matchFields.length === 0) return false;
    const fields: Readonly<Record<string, string>> = { 'metadata.name': name };
    return matchExpressions.every((each) => meets(labels, each)) && matchFields.every((each) => meets(fields, each));
  });
}

/** Gt and Lt are of node selectors alone. */
function meets(labels: Readonly<Record<string, string>>, requirement: Requirement): boolean {
  const value = labels[requirement.key];
  const bound = requirement.values?.[0];
  if (requirement.operator === 'Gt') return isWhole(value) && isWhole(bound) && BigInt(value) > BigInt(bound);
  if (requirement.operator === 'Lt') return isWhole(value) && isWhole(bound) && BigInt(value) < BigInt(bound);
  // A newer Kubernetes may know more. Who is not known to be unwanted stays: letting pods go would be in clear.
  return meetsRequirement(labels, requirement) ?? true;
}

const isWhole = (text: string | undefined): text is string => text !== undefined && /^-?\d{1,18}$/.test(text);
