/** Which service accounts have a pod on which node; a pod that has ended runs nothing. */
import { keyOf, namespaceOf, type Pod, serviceAccountOf } from './objects.js';
import type { PodChanges } from './resources.js';
import { isTerminal } from './workloads.js';

const MAX_ACCOUNTS = 20_000;

export class Places {
  /** Pods that have not ended, by `namespace/name`. */
  readonly #pods = new Map<string, Pod>();
  /** By node: how many pods each service account has there, by `namespace/name`. */
  readonly #nodes = new Map<string, Map<string, number>>();
  /** Each service account's name once, although it is on many nodes; what is beyond the bound is simply not shared. */
  readonly #accounts = new Map<string, string>();

  has(node: string, namespace: string, serviceAccount: string): boolean {
    return this.#nodes.get(node)?.has(`${namespace}/${serviceAccount}`) === true;
  }

  /** Begins anew with these pods. */
  replace(pods: readonly Pod[]): void {
    this.#pods.clear();
    this.#nodes.clear();
    this.#accounts.clear();
    for (const pod of pods) this.#set(keyOf(pod), pod);
  }

  update(changes: PodChanges): void {
    for (const [key, pod] of changes) this.#set(key, pod);
  }

  #set(key: string, pod: Pod | undefined): void {
    const before = this.#pods.get(key);
    if (before !== undefined) this.#count(before, -1);
    if (pod === undefined || isTerminal(pod) || !pod.spec?.nodeName) this.#pods.delete(key);
    else {
      this.#pods.set(key, pod);
      this.#count(pod, 1);
    }
  }

  #count(pod: Pod, by: number): void {
    const node = pod.spec?.nodeName ?? '';
    const accounts = this.#nodes.get(node) ?? new Map<string, number>();
    this.#nodes.set(node, accounts);
    const name = `${namespaceOf(pod)}/${serviceAccountOf(pod)}`;
    const account = this.#accounts.get(name) ?? name;
    if (this.#accounts.size < MAX_ACCOUNTS) this.#accounts.set(account, account);
    const pods = (accounts.get(account) ?? 0) + by;
    if (pods > 0) accounts.set(account, pods);
    else accounts.delete(account);
    if (accounts.size === 0) this.#nodes.delete(node);
  }
}
