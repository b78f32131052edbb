/** Which Services a pod belongs to, found by its labels rather than by trying every selector of its namespace. */
import { type EndpointSlice, keyOf, matchesLabels, namespaceOf, type Pod, type Service } from './objects.js';

/** A Service that a pod belongs to, and the slice that says so where the Service has no selector. */
export interface Membership {
  readonly service: Service;
  readonly slice: EndpointSlice | undefined;
}

/** Whether a Service chooses its pods itself; an empty selector chooses none. */
export function hasSelector(service: Service): boolean {
  for (const _ in service.spec?.selector ?? {}) return true;
  return false;
}

/** Services by namespace and by one label of their selector. */
export class MembershipIndex {
  readonly #byLabel = new Map<string, Map<string, Map<string, Membership[]>>>();
  readonly #sliced: ReadonlyMap<string, readonly Membership[]>;

  /** @param sliced memberships that EndpointSlices state, by `namespace/name` of the pod */
  constructor(services: readonly Service[], sliced: ReadonlyMap<string, readonly Membership[]>) {
    this.#sliced = sliced;
    for (const service of services) {
      const label = Object.entries(service.spec?.selector ?? {})[0];
      if (label === undefined) continue;
      const byKey = getOrMake(this.#byLabel, namespaceOf(service), () => new Map<string, Map<string, Membership[]>>());
      const byValue = getOrMake(byKey, label[0], () => new Map<string, Membership[]>());
      getOrMake(byValue, label[1], (): Membership[] => []).push({ service, slice: undefined });
    }
  }

  of(pod: Pod): Membership[] {
    const memberships: Membership[] = [];
    const labels = pod.metadata.labels;
    const byKey = this.#byLabel.get(namespaceOf(pod));
    if (byKey !== undefined) {
      for (const key in labels) {
        for (const candidate of byKey.get(key)?.get(labels[key] ?? '') ?? []) {
          if (matchesLabels(candidate.service.spec?.selector ?? {}, labels)) memberships.push(candidate);
        }
      }
    }
    if (this.#sliced.size > 0) memberships.push(...(this.#sliced.get(keyOf(pod)) ?? []));
    return memberships;
  }
}

function getOrMake<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  let value = map.get(key);
  if (value === undefined) {
    value = make();
    map.set(key, value);
  }
  return value;
}
