/** The delta xDS client: one stream for addresses and policies, opened again for ever, serving from the last state meanwhile. */
import { type Client, type ClientDuplexStream, connectivityState, type ServiceError, status } from '@grpc/grpc-js';
import { Backoff } from '../../mesh/backoff.js';
import { type ClockOffset, now, offsetByDate } from '../../mesh/clock.js';
import { isRefusedForTime } from '../../mesh/clock-skew.js';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE, deltaAggregatedResources, type TypeUrl } from '../../mesh/control-plane.js';
import type { Logger } from '../../mesh/log.js';
import { envoy } from '../../mesh/proto/generated.js';
import { callMetadata, openChannel, readRoots, readToken } from '../control-plane.js';
import type { StateDelta } from '../engine.js';
import type { ControlPlaneSettings } from '../settings.js';
import { timeHint } from '../token-times.js';
import type { MeshState } from './mesh-state.js';

type Request = envoy.service.discovery.v3.DeltaDiscoveryRequest.$Properties;
type Response = envoy.service.discovery.v3.DeltaDiscoveryResponse;
type Stream = ClientDuplexStream<Request, Buffer>;
const { DeltaDiscoveryResponse } = envoy.service.discovery.v3;

/** Policies first: a workload that names a policy which has not come yet refuses its connections. */
const TYPES: readonly TypeUrl[] = [AUTHORIZATION_TYPE, ADDRESS_TYPE];

const CONNECT_TIMEOUT_MS = 5000;
/** A policy that is written while the controller starts again is in force no later than this. */
const MAX_RETRY_MS = 5000;
/** Files of the controller that are not there yet cost nothing to look for. */
const FILE_RETRY_MS = 250;

/** How long a rejection may take to leave before its stream is ended. */
const LAST_WORD_MS = 50;
/** Reasons told in one NACK; the number of the others is told. */
const MAX_REASONS = 20;
const MAX_REASON_LENGTH = 500;

/** Why streams ended, by ztunnel's names. */
export type Termination = 'ConnectionError' | 'Error' | 'Reconnect' | 'Complete';

export interface XdsCounters {
  readonly terminations: Record<Termination, number>;
  readonly messages: Record<TypeUrl, number>;
  readonly messageBytes: Record<TypeUrl, number>;
  rejectedResources: number;
}

export interface XdsClientOptions {
  readonly settings: ControlPlaneSettings;
  readonly node: envoy.service.discovery.v3.Node.$Properties;
  readonly state: MeshState;
  readonly log: Logger;
  /** Takes a change into the engine; an exception rejects the whole response. */
  apply(delta: StateDelta): void;
  /** A change is in the engine and in the state. */
  onApplied(): void;
  /** A stream is open on which something came. */
  onConnected?(): void;
  /** Both types have been answered for once: called at the first time only. */
  onSynced(): void;
  /** Told how far the controller's clock is ahead, where it says so. */
  onTime?(offset: ClockOffset): void;
  /** The controller cannot be reached. */
  onFailure?(error: Error): void;
}

export class XdsClient {
  readonly counters: XdsCounters = {
    terminations: { ConnectionError: 0, Error: 0, Reconnect: 0, Complete: 0 },
    messages: { [ADDRESS_TYPE]: 0, [AUTHORIZATION_TYPE]: 0 },
    messageBytes: { [ADDRESS_TYPE]: 0, [AUTHORIZATION_TYPE]: 0 },
    rejectedResources: 0,
  };
  readonly #options: XdsClientOptions;
  readonly #backoff = new Backoff({ initialMs: 20, maxMs: MAX_RETRY_MS });
  readonly #synced = new Set<TypeUrl>();
  #client: Client | undefined;
  #stream: Stream | undefined;
  #timer: NodeJS.Timeout | undefined;
  #connectTimer: NodeJS.Timeout | undefined;
  #connected = false;
  #stopped = false;
  /** What was said of files that are not there: it is said once. */
  #said = '';

  constructor(options: XdsClientOptions) {
    this.#options = options;
  }

  /** Types that have not been received and answered for yet. */
  get pending(): readonly TypeUrl[] {
    return TYPES.filter((type) => !this.#synced.has(type));
  }

  /** Whether a stream is open on which something came. */
  get connected(): boolean {
    return this.#connected;
  }

  start(): void {
    this.#open();
  }

  /** What kept it from being connected may be gone: tries now instead of when it is due. */
  retryNow(): void {
    if (this.#stopped || this.#stream !== undefined) return;
    clearTimeout(this.#timer);
    this.#backoff.reset();
    this.#open();
  }

  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#abandon();
  }

  #open(): void {
    const { settings, log, node, state } = this.#options;
    let stream: Stream;
    const sent = now();
    try {
      const roots = readRoots(settings.rootCa);
      const metadata = callMetadata(settings);
      this.#client = openChannel(settings, roots);
      const { path, requestSerialize, responseDeserialize } = deltaAggregatedResources;
      stream = this.#client.makeBidiStreamRequest(path, requestSerialize, responseDeserialize, metadata);
    } catch (error) {
      this.#ended('Error', error as Error, FILE_RETRY_MS);
      return;
    }
    this.#said = '';
    this.#stream = stream;
    stream.on('metadata', (metadata) => {
      const offset = offsetByDate(metadata.get('date')[0], sent, now());
      if (offset !== undefined) this.#options.onTime?.(offset);
    });
    stream.on('data', (bytes: Buffer) => {
      if (this.#stream === stream) this.#receive(stream, bytes);
    });
    stream.on('error', (error: ServiceError) => {
      if (this.#stream === stream) this.#ended(classify(error, this.#connected), error);
    });
    stream.on('end', () => {
      if (this.#stream === stream) this.#ended('Complete');
    });
    const client = this.#client;
    this.#connectTimer = setTimeout(() => {
      if (client.getChannel().getConnectivityState(false) !== connectivityState.READY) {
        stream.cancel();
        if (this.#stream === stream) {
          this.#ended('ConnectionError', new Error(`no connection within ${CONNECT_TIMEOUT_MS} ms`));
        }
      }
    }, CONNECT_TIMEOUT_MS);
    for (const type of TYPES) {
      stream.write({ node, typeUrl: type, initialResourceVersions: state.versions(type) });
    }
    log.debug({ event: 'xds_connecting', host: settings.host, port: settings.port }, 'connecting to the controller');
  }

  #receive(stream: Stream, bytes: Buffer): void {
    const { log, state } = this.#options;
    let response: Response;
    try {
      response = DeltaDiscoveryResponse.decode(bytes);
    } catch (error) {
      this.#ended('Error', new Error(`the controller sent a response that cannot be decoded: ${String(error)}`));
      return;
    }
    const type = TYPES.find((known) => known === response.typeUrl);
    if (type === undefined) {
      const reason = `type ${response.typeUrl} was not asked for`;
      stream.write(answer(response, [reason]));
      log.warn({ event: 'xds_unexpected_type', type: response.typeUrl.slice(0, 200) }, reason.slice(0, 300));
      return;
    }
    if (!this.#connected) {
      this.#connected = true;
      this.#backoff.reset();
      log.info({ event: 'xds_connected', ...this.#address() }, 'connected to the controller');
      this.#options.onConnected?.();
    }
    this.counters.messages[type]++;
    this.counters.messageBytes[type] += bytes.length;
    const change = state.prepare(type, response);
    const reasons = change.rejected;
    try {
      this.#options.apply(change.delta);
      change.commit();
      this.#options.onApplied();
    } catch (error) {
      // Nothing of it was recorded, so that the next stream brings it again.
      const reason = `the change could not be applied: ${(error as Error).message}`;
      stream.write(answer(response, [reason]));
      // Ending the stream now would overtake the rejection.
      stream.removeAllListeners('data');
      this.#timer = setTimeout(() => {
        if (this.#stream === stream) this.#ended('Error', new Error(reason));
      }, LAST_WORD_MS);
      return;
    }
    if (reasons.length > 0) {
      this.counters.rejectedResources += reasons.length;
      log.error(
        { event: 'xds_rejected', type, rejected: reasons.length, reasons: reasons.slice(0, MAX_REASONS) },
        'resources from the controller cannot be used; what was known of them stays in force',
      );
    }
    stream.write(answer(response, reasons));
    log.debug(
      {
        event: 'xds_applied',
        type,
        resources: response.resources.length,
        removed: response.removedResources.length,
        bytes: bytes.length,
      },
      'applied a response',
    );
    const wasPending = this.#synced.size < TYPES.length;
    this.#synced.add(type);
    if (wasPending && this.#synced.size === TYPES.length) this.#options.onSynced();
  }

  /** @param retryMs instead of the next delay of the backoff */
  #ended(termination: Termination, error?: Error, retryMs?: number): void {
    const { log } = this.#options;
    const wasConnected = this.#connected;
    this.#abandon();
    if (this.#stopped) return;
    this.counters.terminations[termination]++;
    const delayMs = retryMs ?? this.#backoff.next();
    if (retryMs !== undefined && error?.message === this.#said) {
      this.#timer = setTimeout(() => this.#open(), delayMs);
      return;
    }
    this.#said = retryMs === undefined ? '' : (error?.message ?? '');
    if (error !== undefined) this.#options.onFailure?.(error);
    const fields = { event: 'xds_disconnected', ...this.#address(), termination, retryInMs: Math.round(delayMs) };
    if (error === undefined) log.info(fields, 'the controller ended the stream; connecting again');
    else {
      log.warn(
        { ...fields, error: error.message, hint: hintFor(error, this.#options.settings.authToken) },
        wasConnected
          ? 'lost the controller; serving from the last state'
          : this.#synced.size > 0
            ? 'cannot reach the controller; serving from the last state'
            : 'cannot reach the controller; nothing is known yet, so connections wait or are refused',
      );
    }
    this.#timer = setTimeout(() => this.#open(), delayMs);
  }

  #abandon(): void {
    clearTimeout(this.#connectTimer);
    const stream = this.#stream;
    const client = this.#client;
    this.#stream = undefined;
    this.#client = undefined;
    this.#connected = false;
    stream?.cancel();
    client?.close();
  }

  #address(): { readonly address: string } {
    const { host, port } = this.#options.settings;
    return { address: `${host}:${port}` };
  }
}

/** ACK where there are no reasons, else NACK. */
function answer(response: Response, reasons: readonly string[]): Request {
  const request = { typeUrl: response.typeUrl, responseNonce: response.nonce };
  if (reasons.length === 0) return request;
  const told = reasons.slice(0, MAX_REASONS).map((reason) => reason.slice(0, MAX_REASON_LENGTH));
  if (reasons.length > MAX_REASONS) told.push(`and ${reasons.length - MAX_REASONS} more`);
  return { ...request, errorDetail: { code: status.INVALID_ARGUMENT, message: told.join('; ') } };
}

const TRANSIENT: ReadonlySet<number> = new Set([status.UNKNOWN, status.CANCELLED, status.DEADLINE_EXCEEDED]);

function classify(error: ServiceError, connected: boolean): Termination {
  if (TRANSIENT.has(error.code)) return 'Reconnect';
  if (error.code === status.UNAVAILABLE && !connected) return 'ConnectionError';
  return 'Error';
}

/** What to do where the control plane does not know the bearer token. */
export function refusedTokenHint(authToken: string): string {
  let time = '';
  try {
    time = timeHint(readToken(authToken) ?? '', Date.now());
  } catch {
    // It cannot be read any more.
  }
  return `check that AUTH_TOKEN is the token of this node and not expired${time === '' ? '' : `; ${time}`}`;
}

/** What an operator can do about a failed call. */
export function hintFor(error: Error & { readonly code?: unknown }, authToken: string): string {
  const { code, message } = error;
  if (code === status.UNAUTHENTICATED) return refusedTokenHint(authToken);
  if (isRefusedForTime(message)) {
    return `clock skew? By the clock of this machine it is ${new Date().toISOString()}; see the clock_skew line, which tells whose clock is off`;
  }
  if (/self.signed|unable to (get|verify)|altnames/i.test(message)) {
    return 'check XDS_ROOT_CA and CA_ROOT_CA against the root that the controller wrote, and the host name it is called by';
  }
  if (/^cannot read|no PEM certificate|is empty$/.test(message)) return 'the file is read again at the next attempt';
  return 'check XDS_ADDRESS and CA_ADDRESS and that the controller runs';
}
