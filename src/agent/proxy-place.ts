/** Where a proxy may run. Root in a pod may reach the ZDS socket by its path: pods can share the node's file system. */

/** `own`: in the agent's network namespace only; `any`: in every one but a pod's. */
export type ProxyNetns = 'own' | 'any';

export interface ProxyPlaces {
  readonly allowed: ProxyNetns;
  /** SO_NETNS_COOKIE of the agent's network namespace. */
  readonly own: bigint;
  /** The pod of this node whose network namespace it is. */
  podOf(cookie: bigint): string | undefined;
  /** Whether proxies are run in this pod, by who runs the agent. */
  isProxyPod?(pod: string): boolean;
}

/**
 * Decides whether a process in a network namespace may be a proxy.
 * @param cookie SO_NETNS_COOKIE of the process's network namespace
 * @returns why it may not; undefined where it may
 */
export function misplaced(cookie: bigint, { allowed, own, podOf, isProxyPod }: ProxyPlaces): string | undefined {
  if (cookie === own) return undefined;
  const pod = podOf(cookie);
  if (pod !== undefined && isProxyPod?.(pod) === true) return undefined;
  if (pod !== undefined) return `the process is in the network namespace of pod ${pod}, where no proxy runs`;
  if (allowed === 'any') return undefined;
  return (
    'the process is in another network namespace than the agent, as a namespace that root in a pod made would be; ' +
    'start the proxy beside the agent, or allow it with --proxy-netns any'
  );
}
