/** Which service accounts have a pod on which node; a pod that has ended runs nothing. */
import { keyOf, namespaceOf, type Pod, serviceAccountOf } from './objects.js';
import type { PodChanges } from './resources.js';
import { isTerminal } from './workloads.js';

/** One node and service account; all its pods share it. */
interface Place {
  readonly key: string;
  pods: number;
}

export class Places {
  readonly #places = new Map<string, Place>();
  readonly #byPod = new Map<string, Place>();

  has(node: string, namespace: string, serviceAccount: string): boolean {
    return this.#places.has(placeKey(node, namespace, serviceAccount));
  }

  /** Begins anew with these pods. */
  replace(pods: readonly Pod[]): void {
    this.#places.clear();
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
    if (before?.key === after) return;
    if (before !== undefined) {
      before.pods--;
      if (before.pods === 0) this.#places.delete(before.key);
      this.#byPod.delete(key);
    }
    if (after !== undefined) {
      const place = this.#places.get(after) ?? { key: after, pods: 0 };
      this.#places.set(after, place);
      place.pods++;
      this.#byPod.set(key, place);
    }
  }
}

const placeKey = (node: string, namespace: string, serviceAccount: string): string =>
  `${node}/${namespace}/${serviceAccount}`;
