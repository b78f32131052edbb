/** One delta xDS stream: requests in, at most one unacknowledged response per type out, in an order that never opens a gap. */
import { randomBytes } from 'node:crypto';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE, type TypeUrl } from '../mesh/control-plane.js';
import { envoy } from '../mesh/proto/generated.js';
import type { Delta, Resource, ResourceStore } from './store.js';
import { Subscription, SubscriptionError, type SubscriptionRequest } from './subscription.js';

type Request = envoy.service.discovery.v3.DeltaDiscoveryRequest;
const { DeltaDiscoveryResponse } = envoy.service.discovery.v3;

/** Longest that addresses wait for the policies they name, in milliseconds: a client that never answers is served anyway. */
const POLICY_HEAD_START_MS = 1000;
/** Clients subscribe to addresses first and to policies right after; addresses wait this long for that. */
const POLICY_SUBSCRIPTION_MS = 50;

/** A first response of fewer resources is sent at once. */
const SMALL_FIRST = 1000;
/** A client that does not answer its first response for so long has had its turn. */
const TURN_MS = 30_000;

/** What a stream tells the log. */
export interface StreamEvents {
  subscribed(type: TypeUrl, wildcard: { readonly initialVersions: number; readonly names: number }): void;
  pushed(type: TypeUrl, counts: { readonly resources: number; readonly removed: number; readonly bytes: number }): void;
  rejected(type: TypeUrl, reason: string): void;
  /** The stream has to end; the client begins anew on another one. */
  failed(error: SubscriptionError): void;
}

export type Stores = Readonly<Record<TypeUrl, ResourceStore>>;

/**
 * Who is told everything now. A cluster's whole state is some 20 MB: with 1,000 proxies that come at once it must not be
 * in memory for each of them, so they take turns, a few at a time; each turn lasts until the client has answered.
 */
export class Turns {
  readonly #limit: () => number;
  readonly #holding = new Set<XdsStream>();
  readonly #waiting = new Set<XdsStream>();
  readonly #idle: () => void;

  /**
   * @param limit streams that may have their turn at once, as things are now
   * @param idle called when nobody holds a turn
   */
  constructor(limit: () => number, idle: () => void = () => {}) {
    this.#limit = limit;
    this.#idle = idle;
  }

  /** Whether it is the stream's turn; else its `pump` is called when it is. */
  take(stream: XdsStream): boolean {
    if (this.#holding.has(stream)) return true;
    if (this.#holding.size >= this.#limit()) {
      this.#waiting.add(stream);
      return false;
    }
    this.#waiting.delete(stream);
    this.#holding.add(stream);
    return true;
  }

  leave(stream: XdsStream): void {
    this.#waiting.delete(stream);
    if (!this.#holding.delete(stream)) return;
    const next = this.#waiting.values().next().value;
    if (next !== undefined) {
      this.#waiting.delete(next);
      // Not in the middle of what the other stream does.
      setImmediate(() => next.pump());
    } else if (this.#holding.size === 0) this.#idle();
  }
}

interface TypeState {
  readonly subscription: Subscription;
  /** Nonce of the response that waits for its ACK or NACK. */
  pending: string | undefined;
  /** Generation up to which the client has answered. */
  answered: number;
}

/**
 * The protocol of one stream, without its transport.
 *
 * Flow control: a type's next response leaves when the one before was answered, and is made then, of the latest state.
 * A slow client so costs one response, however much changes.
 *
 * Order ("make before break"): a workload names its policies, and a proxy refuses where it does not know one. Hence new
 * policies go before the addresses that name them, and removed policies after the addresses that no longer do.
 */
export class XdsStream {
  readonly #stores: Stores;
  readonly #send: (response: Uint8Array) => void;
  readonly #events: StreamEvents;
  readonly #types = new Map<TypeUrl, TypeState>();
  readonly #turns: Turns;
  #turnTimer: NodeJS.Timeout | undefined;
  readonly #prefix = randomBytes(4).toString('hex');
  #nonce = 0;
  readonly #openedAt = performance.now();
  #waitingSince: number | undefined;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(
    stores: Stores,
    send: (response: Uint8Array) => void,
    events: StreamEvents,
    turns: Turns = new Turns(() => 1),
  ) {
    this.#turns = turns;
    this.#stores = stores;
    this.#send = send;
    this.#events = events;
  }

  /** Generation that every subscription has reached, for trimming of the stores. */
  get generation(): number {
    let generation = Number.MAX_SAFE_INTEGER;
    for (const state of this.#types.values()) generation = Math.min(generation, state.subscription.sent);
    return generation;
  }

  /** Takes one request of the client. */
  receive(request: Request): void {
    this.#guarded(() => {
      this.#update(request);
      this.#pump();
    });
  }

  /** Sends what is due; called when the stores changed. */
  pump(): void {
    this.#guarded(() => this.#pump());
  }

  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#endTurn();
  }

  #endTurn(): void {
    clearTimeout(this.#turnTimer);
    this.#turnTimer = undefined;
    this.#turns.leave(this);
  }

  #guarded(work: () => void): void {
    if (this.#closed) return;
    try {
      work();
    } catch (error) {
      if (!(error instanceof SubscriptionError)) throw error;
      this.close();
      this.#events.failed(error);
    }
  }

  #update(request: Request): void {
    const type = request.typeUrl;
    if (type !== ADDRESS_TYPE && type !== AUTHORIZATION_TYPE) return;
    const update: SubscriptionRequest = {
      subscribe: request.resourceNamesSubscribe,
      unsubscribe: request.resourceNamesUnsubscribe,
      initialVersions: new Map(Object.entries(request.initialResourceVersions)),
    };
    const state = this.#types.get(type);
    if (state === undefined) {
      const subscription = new Subscription(this.#stores[type], update);
      this.#types.set(type, { subscription, pending: undefined, answered: -1 });
      this.#events.subscribed(type, { initialVersions: update.initialVersions.size, names: update.subscribe.length });
    } else {
      state.subscription.update(update);
      if (request.responseNonce !== '' && request.responseNonce === state.pending) {
        state.pending = undefined;
        if (type === ADDRESS_TYPE && this.#turnTimer !== undefined) this.#endTurn();
        state.answered = state.subscription.sent;
        // A refused response is not sent again: it would be refused again. The next change of it is.
        if (request.errorDetail) this.#events.rejected(type, request.errorDetail.message ?? '');
      }
    }
  }

  #pump(): void {
    const policies = this.#types.get(AUTHORIZATION_TYPE);
    const addresses = this.#types.get(ADDRESS_TYPE);
    if (policies !== undefined) this.#push(AUTHORIZATION_TYPE, policies, true);
    if (addresses !== undefined && !this.#mustWait(policies)) this.#push(ADDRESS_TYPE, addresses, false);
    if (policies !== undefined && (addresses === undefined || isCurrent(addresses, this.#stores[ADDRESS_TYPE]))) {
      if (policies.subscription.owesRemovals) this.#push(AUTHORIZATION_TYPE, policies, false);
    }
  }

  /** Whether addresses are to wait because the policies of their generation are not with the client yet. */
  #mustWait(policies: TypeState | undefined): boolean {
    const now = performance.now();
    let until: number;
    if (policies === undefined) until = this.#openedAt + POLICY_SUBSCRIPTION_MS;
    else if (isCurrent(policies, this.#stores[AUTHORIZATION_TYPE])) until = 0;
    else {
      this.#waitingSince ??= now;
      until = this.#waitingSince + POLICY_HEAD_START_MS;
    }
    if (now >= until) {
      this.#waitingSince = undefined;
      return false;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.pump(), Math.ceil(until - now));
    return true;
  }

  #push(type: TypeUrl, state: TypeState, holdRemovals: boolean): void {
    if (state.pending !== undefined) return;
    const whole = state.subscription.first >= SMALL_FIRST;
    if (whole) {
      if (!this.#turns.take(this)) return;
      this.#turnTimer = setTimeout(() => this.#endTurn(), TURN_MS);
    }
    const delta = state.subscription.take(holdRemovals);
    if (delta === undefined) {
      state.answered = state.subscription.sent;
      return;
    }
    // Only a client's own answer counts, so that what is large can have one nonce for all and need not be copied.
    const nonce = whole ? 'whole' : `${this.#prefix}-${++this.#nonce}`;
    state.pending = nonce;
    const body = state.subscription.wildcard ? encodeShared(type, delta, whole) : encodeBody(type, delta, true);
    // Fields of a message may come in pieces: what is the stream's own is put behind what all share.
    const response = whole ? body : Buffer.concat([body, DeltaDiscoveryResponse.encode({ nonce }).finish()]);
    this.#send(response);
    this.#events.pushed(type, {
      resources: delta.upserts.length,
      removed: delta.removals.length,
      bytes: response.length,
    });
  }
}

/** Encoded changes that several streams are told; most changes go to all of them. */
const encoded = new WeakMap<Delta, Uint8Array>();

function encodeShared(type: TypeUrl, delta: Delta, whole: boolean): Uint8Array {
  let body = encoded.get(delta);
  if (body === undefined) {
    body = encodeBody(type, delta, false, whole ? 'whole' : '');
    encoded.set(delta, body);
  }
  return body;
}

/** Resources that are encoded at once. What the encoder needs for one is many times what it makes of it. */
const BATCH = 200;
/** More than what tags and lengths of a resource take. */
const RESOURCE_OVERHEAD = 64;

/** Encodes a response, with or without its nonce. */
function encodeBody(type: TypeUrl, delta: Delta, aliased: boolean, nonce = ''): Uint8Array {
  const { upserts, removals } = delta;
  const head = { typeUrl: type, ...(nonce === '' ? {} : { nonce }), removedResources: [...removals] };
  const encode = (resources: readonly Resource[], fields: typeof head | object = {}): Uint8Array =>
    DeltaDiscoveryResponse.encode({
      ...fields,
      resources: resources.map(({ name, version, value, aliases }) => ({
        name,
        version,
        resource: { type_url: type, value },
        aliases: aliased ? [...aliases] : [],
      })),
    }).finish();
  if (upserts.length <= BATCH) return encode(upserts, head);
  // A repeated field may come in pieces, here into one buffer, of which only what is written takes memory.
  const first = encode([], head);
  let size = first.length;
  for (const { name, version, value, aliases } of upserts) {
    size += RESOURCE_OVERHEAD + Buffer.byteLength(name) + version.length + type.length + value.length;
    if (aliased) for (const alias of aliases) size += RESOURCE_OVERHEAD + Buffer.byteLength(alias);
  }
  const body = Buffer.allocUnsafeSlow(size);
  body.set(first);
  let used = first.length;
  for (let index = 0; index < upserts.length; index += BATCH) {
    const batch = encode(upserts.slice(index, index + BATCH));
    body.set(batch, used);
    used += batch.length;
  }
  return body.subarray(0, used);
}

/** Whether the client has answered everything that the store holds (held back removals aside). */
function isCurrent(state: TypeState, store: ResourceStore): boolean {
  return state.pending === undefined && state.answered >= store.generation;
}
