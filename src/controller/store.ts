/** Resources that xDS serves, with a log of what changed when: a stream remembers one number, not fifty thousand names. */
import { createHash } from 'node:crypto';

/** One resource as it goes over the wire. */
export interface Resource {
  readonly name: string;
  /** Hash of the content: equal on every replica and after a restart. */
  readonly version: string;
  /** Encoded `istio.workload.Address` or `istio.security.Authorization`. */
  readonly value: Uint8Array;
  /** Further keys under which an on-demand client may ask for it (`network/ip`, `namespace/hostname`). */
  readonly aliases: readonly string[];
}

/** Names that changed between two generations. */
export interface Delta {
  readonly upserts: readonly Resource[];
  readonly removals: readonly string[];
}

const NOTHING: Delta = { upserts: [], removals: [] };

/** Makes a resource, its version being the hash of its encoded content. */
export function makeResource(name: string, value: Uint8Array, aliases: readonly string[] = []): Resource {
  const hash = createHash('sha256').update(value).digest();
  // Not the beginning of a longer text: V8 would keep that, too.
  const version = hash.toString('base64url', 0, VERSION_BYTES);
  return new SlabResource(name, version, aliases.slice(), value);
}

const VERSION_BYTES = 12;
const SLAB_BYTES = 16_384;
let slab = new Uint8Array(0);
let used = 0;

/**
 * A resource whose content lies beside others of its kind. The encoder's own memory is shared with what lives for a moment
 * only, which would keep three times as much as is of use; memory or a view of its own for each of 50,000 resources would
 * cost as much again as its content.
 */
class SlabResource implements Resource {
  readonly name: string;
  readonly version: string;
  readonly aliases: readonly string[];
  readonly #slab: Uint8Array;
  readonly #offset: number;
  readonly #length: number;

  constructor(name: string, version: string, aliases: readonly string[], value: Uint8Array) {
    this.name = name;
    this.version = version;
    this.aliases = aliases;
    if (value.length > SLAB_BYTES / 4) {
      this.#slab = Uint8Array.from(value);
      this.#offset = 0;
    } else {
      if (used + value.length > slab.length) {
        slab = new Uint8Array(SLAB_BYTES);
        used = 0;
      }
      slab.set(value, used);
      this.#slab = slab;
      this.#offset = used;
      used += value.length;
    }
    this.#length = value.length;
  }

  get value(): Uint8Array {
    return this.#slab.subarray(this.#offset, this.#offset + this.#length);
  }
}

interface Change {
  readonly generation: number;
  readonly name: string;
}

/** All resources of one type. Generations only grow; they are of this process and never go over the wire. */
export class ResourceStore {
  #resources = new Map<string, Resource>();
  /** Made when a client first asks on demand: most clients are told everything. */
  #byAlias: ReadonlyMap<string, readonly Resource[]> | undefined;
  #log: Change[] = [];
  #generation = 0;
  /** Oldest generation from which the log is whole. */
  #since = 0;
  /** What changed since the generation that was asked for last: most streams are at the same one. */
  #latest: { readonly from: number; readonly to: number; readonly delta: Delta } | undefined;
  /** Everything as a change, while someone is being told it. */
  #whole: { readonly generation: number; readonly delta: Delta } | undefined;

  get resources(): ReadonlyMap<string, Resource> {
    return this.#resources;
  }

  get generation(): number {
    return this.#generation;
  }

  /** Resources that a client which asks on demand means by `key`: a name or an alias. */
  find(key: string): readonly Resource[] {
    const own = this.#resources.get(key);
    this.#byAlias ??= indexAliases(this.#resources);
    const others = this.#byAlias.get(key) ?? [];
    return own === undefined ? others : [own, ...others.filter((other) => other !== own)];
  }

  /**
   * Replaces everything by `next`, which is the store's own from then on.
   * @param generation of the new state, greater than every one before
   * @returns number of resources that were added, changed or removed
   */
  commit(next: Map<string, Resource>, generation: number): number {
    const before = this.#log.length;
    for (const [name, resource] of next) {
      const before = this.#resources.get(name);
      if (before !== resource && before?.version !== resource.version) this.#log.push({ generation, name });
    }
    for (const name of this.#resources.keys()) {
      if (!next.has(name)) this.#log.push({ generation, name });
    }
    const changed = this.#log.length - before;
    this.#resources = next;
    this.#generation = generation;
    if (changed > 0) this.#byAlias = undefined;
    return changed;
  }

  /**
   * Takes some changes. @param generation of the new state, greater than every one before
   * @returns number of resources that were added, changed or removed
   */
  commitDelta({ upserts, removals }: Delta, generation: number): number {
    const before = this.#log.length;
    for (const resource of upserts) {
      const same = this.#resources.get(resource.name)?.version === resource.version;
      this.#resources.set(resource.name, resource);
      if (!same) this.#log.push({ generation, name: resource.name });
    }
    for (const name of removals) if (this.#resources.delete(name)) this.#log.push({ generation, name });
    this.#generation = generation;
    const changed = this.#log.length - before;
    if (changed > 0) this.#byAlias = undefined;
    return changed;
  }

  /**
   * What changed after `generation`; undefined where that is too long ago to know, so that the client has to begin anew.
   */
  changesSince(generation: number): Delta | undefined {
    if (generation < this.#since) return undefined;
    if (generation === this.#generation) return NOTHING;
    if (this.#latest?.from === generation && this.#latest.to === this.#generation) return this.#latest.delta;
    const upserts: Resource[] = [];
    const removals: string[] = [];
    const seen = new Set<string>();
    for (let index = this.#log.length - 1; index >= 0; index--) {
      const change = this.#log[index];
      if (change === undefined || change.generation <= generation) break;
      if (seen.has(change.name)) continue;
      seen.add(change.name);
      const resource = this.#resources.get(change.name);
      if (resource === undefined) removals.push(change.name);
      else upserts.push(resource);
    }
    const delta = { upserts, removals };
    this.#latest = { from: generation, to: this.#generation, delta };
    return delta;
  }

  /** Everything, the same object for all who ask at one generation. */
  whole(): Delta {
    if (this.#whole?.generation !== this.#generation) {
      this.#whole = {
        generation: this.#generation,
        delta: { upserts: [...this.#resources.values()], removals: [] },
      };
    }
    return this.#whole.delta;
  }

  /** Nobody is being told everything any more. */
  forgetWhole(): void {
    this.#whole = undefined;
  }

  /**
   * Forgets changes that every stream has seen.
   * @param seen the smallest generation that some stream is at
   * @param limit changes kept at most: streams that are further behind must begin anew
   */
  trim(seen: number, limit: number): void {
    let drop = this.#log.findIndex((change) => change.generation > seen);
    if (drop === -1) drop = this.#log.length;
    drop = Math.max(drop, this.#log.length - limit);
    if (drop === 0) return;
    const last = this.#log[drop - 1];
    if (last !== undefined) this.#since = Math.max(this.#since, last.generation);
    this.#log = this.#log.slice(drop);
  }
}

function indexAliases(resources: ReadonlyMap<string, Resource>): Map<string, Resource[]> {
  const index = new Map<string, Resource[]>();
  for (const resource of resources.values()) {
    for (const alias of resource.aliases) {
      const list = index.get(alias);
      if (list === undefined) index.set(alias, [resource]);
      else list.push(resource);
    }
  }
  return index;
}
