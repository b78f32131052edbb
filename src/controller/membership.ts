/** What selects a pod by its labels, found without trying every selector of its namespace. */
import { type EndpointSlice, keyOf, matchesLabels, namespaceOf, type Pod, type Service } from './objects.js';

type Labels = Readonly<Record<string, string>>;

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

/** Things that select by labels within their namespace, by one label of their selector. An empty selector selects nothing. */
export class LabelIndex<T> {
  readonly #byLabel = new Map<string, Map<string, Map<string, { readonly selector: Labels; readonly value: T }[]>>>();

  add(namespace: string, selector: Labels, value: T): void {
    const label = Object.entries(selector)[0];
    if (label === undefined) return;
    const byKey = getOrMake(
      this.#byLabel,
      namespace,
      () => new Map<string, Map<string, { readonly selector: Labels; readonly value: T }[]>>(),
    );
    const byValue = getOrMake(
      byKey,
      label[0],
      () => new Map<string, { readonly selector: Labels; readonly value: T }[]>(),
    );
    getOrMake(byValue, label[1], (): { readonly selector: Labels; readonly value: T }[] => []).push({
      selector,
      value,
    });
  }

  /** Adds what selects the labels to `found`. */
  find(namespace: string, labels: Labels | undefined, found: T[] = []): T[] {
    const byKey = this.#byLabel.get(namespace);
    if (byKey === undefined || labels === undefined) return found;
    for (const [key, byValue] of byKey) {
      const own = labels[key];
      if (own === undefined) continue;
      for (const { selector, value } of byValue.get(own) ?? []) if (matchesLabels(selector, labels)) found.push(value);
    }
    return found;
  }
}

/** Services by what they select. */
export class MembershipIndex {
  readonly #selecting = new LabelIndex<Membership>();
  readonly #sliced: ReadonlyMap<string, readonly Membership[]>;

  /** @param sliced memberships that EndpointSlices state, by `namespace/name` of the pod */
  constructor(services: readonly Service[], sliced: ReadonlyMap<string, readonly Membership[]>) {
    this.#sliced = sliced;
    for (const service of services) {
      this.#selecting.add(namespaceOf(service), service.spec?.selector ?? {}, { service, slice: undefined });
    }
  }

  of(pod: Pod): Membership[] {
    const memberships = this.#selecting.find(namespaceOf(pod), pod.metadata.labels);
    if (this.#sliced.size > 0) memberships.push(...(this.#sliced.get(keyOf(pod)) ?? []));
    return memberships;
  }

  /** Services whose selector fits, for what is no pod. */
  selecting(namespace: string, labels: Labels): Service[] {
    return this.#selecting.find(namespace, labels).map(({ service }) => service);
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
