/** One delta xDS stream: requests in, at most one unacknowledged response per type out, in an order that never opens a gap. */
import { randomBytes } from 'node:crypto';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE, type TypeUrl } from '../mesh/control-plane.js';
import { envoy } from '../mesh/proto/generated.js';
import type { ResourceStore } from './store.js';
import { Subscription, SubscriptionError, type SubscriptionRequest } from './subscription.js';

type Request = envoy.service.discovery.v3.DeltaDiscoveryRequest;
const { DeltaDiscoveryResponse } = envoy.service.discovery.v3;

/** Longest that addresses wait for the policies they name, in milliseconds: a client that never answers is served anyway. */
const POLICY_HEAD_START_MS = 1000;
/** Clients subscribe to addresses first and to policies right after; addresses wait this long for that. */
const POLICY_SUBSCRIPTION_MS = 50;

/** What a stream tells the log. */
export interface StreamEvents {
  subscribed(type: TypeUrl, wildcard: { readonly initialVersions: number; readonly names: number }): void;
  pushed(type: TypeUrl, counts: { readonly resources: number; readonly removed: number; readonly bytes: number }): void;
  rejected(type: TypeUrl, reason: string): void;
  /** The stream has to end; the client begins anew on another one. */
  failed(error: SubscriptionError): void;
}

export type Stores = Readonly<Record<TypeUrl, ResourceStore>>;

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
  readonly #prefix = randomBytes(4).toString('hex');
  #nonce = 0;
  readonly #openedAt = performance.now();
  #waitingSince: number | undefined;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(stores: Stores, send: (response: Uint8Array) => void, events: StreamEvents) {
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
    const delta = state.subscription.take(holdRemovals);
    if (delta === undefined) {
      state.answered = state.subscription.sent;
      return;
    }
    const nonce = `${this.#prefix}-${++this.#nonce}`;
    state.pending = nonce;
    const response = DeltaDiscoveryResponse.encode({
      typeUrl: type,
      nonce,
      resources: delta.upserts.map(({ name, version, value, aliases }) => ({
        name,
        version,
        resource: { type_url: type, value },
        aliases: state.subscription.wildcard ? [] : [...aliases],
      })),
      removedResources: [...delta.removals],
    }).finish();
    this.#send(response);
    this.#events.pushed(type, {
      resources: delta.upserts.length,
      removed: delta.removals.length,
      bytes: response.length,
    });
  }
}

/** Whether the client has answered everything that the store holds (held back removals aside). */
function isCurrent(state: TypeState, store: ResourceStore): boolean {
  return state.pending === undefined && state.answered >= store.generation;
}
