/** What one client has asked for of one resource type, and what it has been told so far. */
import type { Delta, Resource, ResourceStore } from './store.js';

/** The part of a DeltaDiscoveryRequest that concerns one type. */
export interface SubscriptionRequest {
  readonly subscribe: readonly string[];
  readonly unsubscribe: readonly string[];
  readonly initialVersions: ReadonlyMap<string, string>;
}

const WILDCARD = '*';
/** Names that a client may ask for on demand; more ends its stream. */
const MAX_NAMES = 100_000;

/** A client that asks for more than it may, or is too far behind; its stream is ended and it begins anew. */
export class SubscriptionError extends Error {}

export class Subscription {
  readonly #store: ResourceStore;
  #wildcard = false;
  /** On-demand keys, as the client spelled them. */
  readonly #keys = new Set<string>();
  /** Versions told to the client, for on-demand names only: a wildcard client is described by its generation. */
  readonly #told = new Map<string, string>();
  /** Generation up to which everything was put into a response. */
  #sent = 0;
  /** Resources and removals owed besides what changed since `#sent`. */
  #owed: { upserts: Map<string, Resource>; removals: Set<string> } = { upserts: new Map(), removals: new Set() };
  /** A first response is due even where it is empty: clients are ready once they have one. */
  #answerDue = false;
  /** A wildcard client that has nothing: it is told everything of the moment at which it is its turn. */
  #everything = false;

  constructor(store: ResourceStore, first: SubscriptionRequest) {
    this.#store = store;
    this.#answerDue = true;
    this.#sent = store.generation;
    this.#wildcard =
      !first.unsubscribe.includes(WILDCARD) && (first.subscribe.length === 0 || first.subscribe.includes(WILDCARD));
    if (this.#wildcard && first.initialVersions.size === 0) {
      this.#everything = true;
      return;
    }
    if (this.#wildcard) {
      for (const resource of store.resources.values()) {
        if (first.initialVersions.get(resource.name) !== resource.version) {
          this.#owed.upserts.set(resource.name, resource);
        }
      }
      for (const name of first.initialVersions.keys()) {
        if (!store.resources.has(name)) this.#owed.removals.add(name);
      }
      return;
    }
    for (const [name, version] of first.initialVersions) this.#told.set(name, version);
    this.#subscribe([...first.initialVersions.keys(), ...first.subscribe]);
  }

  /** Generation up to which the client has been sent everything. */
  get sent(): number {
    return this.#everything ? this.#store.generation : this.#sent;
  }

  /** How many resources the client is to be told at once because it knows nothing yet; else 0. */
  get first(): number {
    return this.#everything ? this.#store.resources.size : 0;
  }

  /** A later request of the client; an ACK with no names changes nothing. */
  update(request: SubscriptionRequest): void {
    for (const key of request.unsubscribe) {
      if (key === WILDCARD) this.#wildcard = false;
      this.#keys.delete(key);
      this.#told.delete(key);
    }
    if (request.subscribe.length === 0) return;
    this.#answerDue = true;
    this.#subscribe(request.subscribe);
  }

  #subscribe(keys: readonly string[]): void {
    for (const key of keys) {
      if (key === WILDCARD) continue;
      if (this.#keys.size >= MAX_NAMES) throw new SubscriptionError(`more than ${MAX_NAMES} names are subscribed`);
      this.#keys.add(key);
      const found = this.#store.find(key);
      for (const resource of found) {
        this.#keys.add(resource.name);
        if (this.#told.get(resource.name) !== resource.version) this.#owed.upserts.set(resource.name, resource);
      }
      // "Not there" is an answer too: the client waits for a resource or a removal of that name.
      if (found.length === 0) this.#owed.removals.add(key);
    }
  }

  /**
   * Everything the client does not have yet, or undefined where nothing is due. Only the latest state counts: what
   * changed several times since the last call is told once.
   * @param holdRemovals keeps removals back; they stay owed
   */
  take(holdRemovals: boolean): Delta | undefined {
    if (this.#everything) {
      this.#everything = false;
      this.#answerDue = false;
      this.#sent = this.#store.generation;
      return this.#store.whole();
    }
    const changes = this.#store.changesSince(this.#sent);
    if (changes === undefined) throw new SubscriptionError('the client is too far behind; it begins anew');
    this.#sent = this.#store.generation;
    const nothingOwed = this.#owed.upserts.size === 0 && this.#owed.removals.size === 0;
    // As it is, the same object for all streams, so that it is encoded once.
    if (this.#wildcard && nothingOwed && changes.upserts.length > 0 && !(holdRemovals && changes.removals.length > 0)) {
      this.#answerDue = false;
      return changes;
    }
    for (const resource of changes.upserts) {
      if (!this.#wants(resource)) continue;
      this.#owed.removals.delete(resource.name);
      this.#owed.upserts.set(resource.name, resource);
    }
    for (const name of changes.removals) {
      this.#owed.upserts.delete(name);
      if (this.#wildcard || this.#keys.has(name)) this.#owed.removals.add(name);
    }
    const upserts = [...this.#owed.upserts.values()];
    const removals = holdRemovals ? [] : [...this.#owed.removals];
    if (upserts.length === 0 && removals.length === 0 && !this.#answerDue) return undefined;
    this.#answerDue = false;
    this.#owed = { upserts: new Map(), removals: holdRemovals ? this.#owed.removals : new Set() };
    if (!this.#wildcard) {
      for (const resource of upserts) this.#told.set(resource.name, resource.version);
      for (const name of removals) this.#told.delete(name);
    }
    return { upserts, removals };
  }

  /** Whether the client is told everything. */
  get wildcard(): boolean {
    return this.#wildcard;
  }

  /** Whether removals are held back. */
  get owesRemovals(): boolean {
    return this.#owed.removals.size > 0;
  }

  #wants(resource: Resource): boolean {
    if (this.#wildcard || this.#keys.has(resource.name)) return true;
    if (!resource.aliases.some((alias) => this.#keys.has(alias))) return false;
    this.#keys.add(resource.name);
    return true;
  }
}
