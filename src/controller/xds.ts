/** The delta xDS service: authenticates streams, keeps them, and tells all of them when resources changed. */
import { type ServerDuplexStream, status } from '@grpc/grpc-js';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE, type TypeUrl } from '../mesh/control-plane.js';
import type { Logger } from '../mesh/log.js';
import type { envoy } from '../mesh/proto/generated.js';
import { bearerToken, grpcError } from './grpc.js';
import { type Resource, ResourceStore } from './store.js';
import { type Stores, XdsStream } from './stream.js';

type Request = envoy.service.discovery.v3.DeltaDiscoveryRequest;
type Call = ServerDuplexStream<Request, Uint8Array>;

/** Everything that is served. */
export interface Snapshot {
  readonly addresses: ReadonlyMap<string, Resource>;
  readonly authorizations: ReadonlyMap<string, Resource>;
}

/** Changes kept for streams that are behind, beyond the number of resources. */
const MIN_LOG = 10_000;
/** A node has one proxy, two while it is upgraded; more is a proxy that leaks streams. */
const MAX_STREAMS_PER_NODE = 8;

interface Open {
  readonly node: string;
  readonly stream: XdsStream;
  end(code: status, details: string): void;
}

export class XdsServer {
  readonly #log: Logger;
  readonly #nodeOf: (token: string) => string | undefined;
  readonly #stores: Stores = { [ADDRESS_TYPE]: new ResourceStore(), [AUTHORIZATION_TYPE]: new ResourceStore() };
  readonly #open = new Set<Open>();
  #generation = 0;

  /** @param nodeOf the node whose token it is */
  constructor(log: Logger, nodeOf: (token: string) => string | undefined) {
    this.#log = log;
    this.#nodeOf = nodeOf;
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

  /** Ends the streams of nodes that are no more. */
  endNode(node: string): void {
    for (const open of [...this.#open]) {
      if (open.node === node) open.end(status.UNAUTHENTICATED, 'the node is no more');
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
    const node = token === undefined ? undefined : this.#nodeOf(token);
    if (node === undefined) {
      const reason = token === undefined ? 'no bearer token' : 'unknown token';
      this.#log.warn({ event: 'xds_refused', peer, reason }, 'refused an xDS stream');
      call.emit('error', grpcError(status.UNAUTHENTICATED, 'authentication failure'));
      return;
    }
    if ([...this.#open].filter((open) => open.node === node).length >= MAX_STREAMS_PER_NODE) {
      this.#log.warn({ event: 'xds_refused', peer, node, reason: 'too many streams' }, 'refused an xDS stream');
      call.emit('error', grpcError(status.RESOURCE_EXHAUSTED, `more than ${MAX_STREAMS_PER_NODE} streams of one node`));
      return;
    }
    this.#serve(call, node, peer);
  }

  #serve(call: Call, node: string, peer: string): void {
    const log = this.#log.child({ node, peer });
    let named = false;
    const end = (code: status, details: string): void => {
      finish(details);
      call.emit('error', grpcError(code, details));
    };
    const stream = new XdsStream(this.#stores, (response) => void call.write(response), {
      subscribed: (type, counts) => log.info({ event: 'xds_subscribed', type, ...counts }, 'subscribed'),
      pushed: (type, counts) => log.debug({ event: 'xds_pushed', type, ...counts }, 'pushed'),
      rejected: (type, reason) => log.error({ event: 'xds_rejected', type, reason }, 'the proxy rejected resources'),
      failed: (error) => end(status.ABORTED, error.message),
    });
    const open: Open = { node, stream, end };
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
