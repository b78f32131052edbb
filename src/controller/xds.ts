/** The delta xDS service: authenticates streams, keeps them, and tells all of them when resources changed. */
import { type ServerDuplexStream, status } from '@grpc/grpc-js';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE, type TypeUrl } from '../mesh/control-plane.js';
import type { Logger } from '../mesh/log.js';
import type { envoy } from '../mesh/proto/generated.js';
import { type Caller, Refusal } from './callers.js';
import { bearerToken, grpcError } from './grpc.js';
import { Collector } from './heap.js';
import { type Delta, type Resource, ResourceStore } from './store.js';
import { type Stores, Turns, XdsStream } from './stream.js';

type Request = envoy.service.discovery.v3.DeltaDiscoveryRequest;
type Call = ServerDuplexStream<Request, Uint8Array>;

/** Everything that is served. */
export interface Snapshot {
  /** The server's own once it is published. */
  readonly addresses: Map<string, Resource>;
  readonly authorizations: Map<string, Resource>;
}

/** Changes kept for streams that are behind, beyond the number of resources. */
const MIN_LOG = 10_000;
/** Bytes of whole states that may be on their way at once; the transport holds each twice. */
const FIRST_BYTES = 40 << 20;
/** However large the state, a slow client must not keep all others waiting. */
const FIRST_AT_ONCE = 2;
/** What a workload takes in a response, more or less. */
const RESOURCE_BYTES = 400;
/** A node has one proxy, two while it is upgraded; more is a proxy that leaks streams. */
const MAX_STREAMS_PER_NODE = 8;

interface Open {
  readonly caller: Caller;
  readonly stream: XdsStream;
  end(code: status, details: string): void;
}

export class XdsServer {
  readonly #log: Logger;
  readonly #authenticate: (token: string) => Caller | Promise<Caller>;
  readonly #stores: Stores = { [ADDRESS_TYPE]: new ResourceStore(), [AUTHORIZATION_TYPE]: new ResourceStore() };
  readonly #open = new Set<Open>();
  readonly #collector = new Collector();
  readonly #turns = new Turns(
    () =>
      Math.max(FIRST_AT_ONCE, Math.floor(FIRST_BYTES / (RESOURCE_BYTES * this.#stores[ADDRESS_TYPE].resources.size))),
    () => {
      for (const store of Object.values(this.#stores)) store.forgetWhole();
      this.#collector.later();
    },
  );
  #generation = 0;

  /** @param authenticate who has the token; throws {@link Refusal} where nobody has */
  constructor(log: Logger, authenticate: (token: string) => Caller | Promise<Caller>) {
    this.#log = log;
    this.#authenticate = authenticate;
  }

  /** Number of open streams. */
  get streams(): number {
    return this.#open.size;
  }

  /** Serves a new state: only what differs from the one before is sent. @returns how many resources differ */
  publish(snapshot: Snapshot): { addresses: number; authorizations: number } {
    const generation = ++this.#generation;
    const authorizations = this.#stores[AUTHORIZATION_TYPE].commit(snapshot.authorizations, generation);
    const addresses = this.#stores[ADDRESS_TYPE].commit(snapshot.addresses, generation);
    for (const { stream } of [...this.#open]) stream.pump();
    this.#trim();
    return { addresses, authorizations };
  }

  /** Serves changes of addresses. @returns how many resources differ */
  publishAddresses(delta: Delta): { addresses: number; authorizations: number } {
    const generation = ++this.#generation;
    this.#stores[AUTHORIZATION_TYPE].commitDelta({ upserts: [], removals: [] }, generation);
    const addresses = this.#stores[ADDRESS_TYPE].commitDelta(delta, generation);
    if (addresses > 0) for (const { stream } of [...this.#open]) stream.pump();
    this.#trim();
    return { addresses, authorizations: 0 };
  }

  /** Ends the streams of callers that are no more what they were let in as. */
  recheck(remains: (caller: Caller) => boolean): void {
    for (const open of [...this.#open]) {
      if (!remains(open.caller)) open.end(status.UNAUTHENTICATED, 'the node or its proxy is no more');
    }
  }

  /** Ends all streams: the controller stops. */
  close(): void {
    for (const open of [...this.#open]) open.end(status.UNAVAILABLE, 'the controller stops');
  }

  /** Handler of DeltaAggregatedResources. */
  handle(call: Call): void {
    const peer = call.getPeer();
    const token = bearerToken(call.metadata);
    const refuse = (error: unknown): void => {
      const reason = error instanceof Error ? error.message : String(error);
      this.#log.warn({ event: 'xds_refused', peer, reason }, 'refused an xDS stream');
      const code = error instanceof Refusal ? status.UNAUTHENTICATED : status.UNAVAILABLE;
      call.emit(
        'error',
        grpcError(code, error instanceof Refusal ? 'authentication failure' : 'cannot authenticate now'),
      );
    };
    if (token === undefined) {
      refuse(new Refusal('no bearer token'));
      return;
    }
    let caller: Caller | Promise<Caller>;
    try {
      caller = this.#authenticate(token);
    } catch (error) {
      refuse(error);
      return;
    }
    if (caller instanceof Promise) {
      caller.then((known) => {
        if (!call.cancelled) this.#admit(call, known, peer);
      }, refuse);
    } else this.#admit(call, caller, peer);
  }

  #admit(call: Call, caller: Caller, peer: string): void {
    const { node } = caller;
    if ([...this.#open].filter((open) => open.caller.node === node).length >= MAX_STREAMS_PER_NODE) {
      this.#log.warn({ event: 'xds_refused', peer, node, reason: 'too many streams' }, 'refused an xDS stream');
      call.emit('error', grpcError(status.RESOURCE_EXHAUSTED, `more than ${MAX_STREAMS_PER_NODE} streams of one node`));
      return;
    }
    this.#serve(call, caller, peer);
  }

  #serve(call: Call, caller: Caller, peer: string): void {
    const { node } = caller;
    const log = this.#log.child({ node, peer });
    let named = false;
    const end = (code: status, details: string): void => {
      finish(details);
      call.emit('error', grpcError(code, details));
    };
    const stream = new XdsStream(
      this.#stores,
      (response) => void call.write(response),
      {
        subscribed: (type, counts) => log.info({ event: 'xds_subscribed', type, ...counts }, 'subscribed'),
        pushed: (type, counts) => log.debug({ event: 'xds_pushed', type, ...counts }, 'pushed'),
        rejected: (type, reason) => log.error({ event: 'xds_rejected', type, reason }, 'the proxy rejected resources'),
        failed: (error) => end(status.ABORTED, error.message),
      },
      this.#turns,
    );
    const open: Open = { caller, stream, end };
    const finish = (reason: string): void => {
      if (!this.#open.delete(open)) return;
      stream.close();
      log.info({ event: 'xds_closed', reason }, 'xDS stream closed');
    };
    this.#open.add(open);
    log.info({ event: 'xds_opened' }, 'xDS stream opened');
    call.on('data', (request: Request) => {
      if (!named && request.node) {
        named = true;
        const { id, metadata } = request.node;
        const claimed = metadata?.fields?.NODE_NAME?.stringValue;
        if (claimed && claimed !== node) {
          log.warn({ event: 'xds_node_mismatch', id, claimed }, 'the proxy claims another node than its token is of');
        } else log.info({ event: 'xds_node', id }, 'proxy named itself');
      }
      stream.receive(request);
    });
    call.on('end', () => {
      finish('the client ended it');
      call.end();
    });
    call.on('cancelled', () => finish('cancelled'));
    call.on('error', (error) => finish(error.message));
  }

  #trim(): void {
    let seen = this.#generation;
    for (const { stream } of this.#open) seen = Math.min(seen, stream.generation);
    for (const type of [ADDRESS_TYPE, AUTHORIZATION_TYPE] satisfies TypeUrl[]) {
      const store = this.#stores[type];
      store.trim(seen, Math.max(MIN_LOG, store.resources.size));
    }
  }
}
