/** Pods in which a proxy may run: of the agent's own DaemonSet, the generation before or after this one. */
import { namespaceOf, type Pod } from '../mesh/kubernetes.js';
import type { AgentSettings } from './settings.js';

const ownerOf = (pod: Pod): string | undefined =>
  pod.metadata.ownerReferences?.find(({ kind, controller }) => kind === 'DaemonSet' && controller === true)?.name;

/**
 * Whether a pod may hold a proxy. Who may make pods in the agent's own namespace rules the node anyhow.
 * @param name NAMESPACE/NAME of the pod
 * @param pods those of this node
 */
export function isSibling(
  name: string,
  pods: readonly Pod[],
  { ownPod, proxyNetns }: Pick<AgentSettings, 'ownPod' | 'proxyNetns'>,
): boolean {
  if (ownPod === undefined) return false;
  const find = (wanted: string): Pod | undefined =>
    pods.find((pod) => `${namespaceOf(pod)}/${pod.metadata.name}` === wanted);
  const pod = find(name);
  if (pod === undefined || namespaceOf(pod) !== ownPod.namespace) return false;
  if (proxyNetns === 'any') return true;
  const self = find(`${ownPod.namespace}/${ownPod.name}`);
  const owner = self === undefined ? undefined : ownerOf(self);
  return owner !== undefined && ownerOf(pod) === owner;
}
