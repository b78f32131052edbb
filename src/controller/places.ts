/** Which service accounts have a pod on which node; a pod that has ended runs nothing. */
import { keyOf, namespaceOf, type Pod, serviceAccountOf } from './objects.js';
import type { PodChanges } from './resources.js';
import { isTerminal } from './workloads.js';

export class Places {
  readonly #counts = new Map<string, number>();
  readonly #byPod = new Map<string, string>();

  has(node: string, namespace: string, serviceAccount: string): boolean {
    return this.#counts.has(placeKey(node, namespace, serviceAccount));
  }

  /** Begins anew with these pods. */
  replace(pods: readonly Pod[]): void {
    this.#counts.clear();
    this.#byPod.clear();
    for (const pod of pods) this.#set(keyOf(pod), pod);
  }

  update(changes: PodChanges): void {
    for (const [key, pod] of changes) this.#set(key, pod);
  }

  #set(key: string, pod: Pod | undefined): void {
    const node = pod?.spec?.nodeName;
    const after =
      pod === undefined || node === undefined || node === '' || isTerminal(pod)
        ? undefined
        : placeKey(node, namespaceOf(pod), serviceAccountOf(pod));
    const before = this.#byPod.get(key);
    if (before === after) return;
    if (before !== undefined) {
      const count = (this.#counts.get(before) ?? 0) - 1;
      if (count > 0) this.#counts.set(before, count);
      else this.#counts.delete(before);
      this.#byPod.delete(key);
    }
    if (after !== undefined) {
      this.#counts.set(after, (this.#counts.get(after) ?? 0) + 1);
      this.#byPod.set(key, after);
    }
  }
}

const placeKey = (node: string, namespace: string, serviceAccount: string): string =>
  `${node}/${namespace}/${serviceAccount}`;
