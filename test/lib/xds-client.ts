/** A client of the controller for tests: raw delta xDS and CreateCertificate over TLS, with every answer in its hands. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Client, type ClientDuplexStream, credentials, Metadata, type ServiceError } from '@grpc/grpc-js';
import { envoy, type google, istio } from '../../src/mesh/proto/generated.js';

const { DeltaDiscoveryRequest, DeltaDiscoveryResponse } = envoy.service.discovery.v3;
const { IstioCertificateRequest, IstioCertificateResponse } = istio.v1.auth;

export const ADDRESS = 'type.googleapis.com/istio.workload.Address';
export const AUTHORIZATION = 'type.googleapis.com/istio.security.Authorization';
export type Response = envoy.service.discovery.v3.DeltaDiscoveryResponse;

/** A client of the controller on `port` of the loopback, trusting the root in its data folder. */
export function connect(data: string, port: number): Client {
  const root = readFileSync(join(data, 'root-cert.pem'));
  return new Client(`127.0.0.1:${port}`, credentials.createSsl(root), { 'grpc.max_receive_message_length': -1 });
}

/** Metadata with the token of a node, or with a header as given. */
export function bearer(data: string, node: string): Metadata {
  return authorization(`Bearer ${readFileSync(join(data, 'tokens', node), 'utf8').trim()}`);
}

export function authorization(header: string | undefined): Metadata {
  const metadata = new Metadata();
  if (header !== undefined) metadata.set('authorization', header);
  return metadata;
}

/** One delta stream; responses wait in a queue until a test takes them. */
export class TestStream {
  readonly call: ClientDuplexStream<envoy.service.discovery.v3.DeltaDiscoveryRequest.$Properties, Response>;
  readonly queue: Response[] = [];
  error: ServiceError | undefined;
  ended = false;
  #wake: (() => void) | undefined;

  constructor(client: Client, metadata: Metadata) {
    this.call = client.makeBidiStreamRequest(
      '/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources',
      (request) => Buffer.from(DeltaDiscoveryRequest.encode(request).finish()),
      (bytes) => DeltaDiscoveryResponse.decode(bytes),
      metadata,
    );
    this.call.on('data', (response: Response) => {
      this.queue.push(response);
      this.#wake?.();
    });
    this.call.on('error', (error) => {
      this.error = error as ServiceError;
      this.#wake?.();
    });
    this.call.on('end', () => {
      this.ended = true;
      this.#wake?.();
    });
  }

  send(request: envoy.service.discovery.v3.DeltaDiscoveryRequest.$Properties): void {
    this.call.write(request);
  }

  subscribe(typeUrl: string, initialResourceVersions: Record<string, string> = {}): void {
    this.send({ typeUrl, initialResourceVersions, node: { id: 'ztunnel~1.1.1.1~p.ns~ns.svc.cluster.local' } });
  }

  ack(response: Response): void {
    this.send({ typeUrl: response.typeUrl, responseNonce: response.nonce });
  }

  nack(response: Response, message: string): void {
    this.send({ typeUrl: response.typeUrl, responseNonce: response.nonce, errorDetail: { message } });
  }

  /** The next response, or undefined where none comes within `ms`. */
  async poll(ms: number): Promise<Response | undefined> {
    const until = performance.now() + ms;
    while (this.queue.length === 0 && this.error === undefined && performance.now() < until) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, until - performance.now());
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
    return this.queue.shift();
  }

  /** The next response. @throws Error where none comes within five seconds, or the stream fails */
  async next(): Promise<Response> {
    const response = await this.poll(5000);
    if (response === undefined) throw new Error(`no response: ${this.error?.message ?? 'timeout'}`);
    return response;
  }

  /** The next response, acknowledged. */
  async nextAcked(): Promise<Response> {
    const response = await this.next();
    this.ack(response);
    return response;
  }

  /** The error with which the server ends the stream. */
  async failure(): Promise<ServiceError> {
    const until = performance.now() + 5000;
    while (this.error === undefined && performance.now() < until) await new Promise((done) => setTimeout(done, 5));
    if (this.error === undefined) throw new Error('the stream did not fail');
    return this.error;
  }
}

/** Sorted names of a response: `+added` and `-removed`. */
export function summary(response: Response): string[] {
  return [
    ...response.resources.map(({ name }) => `+${name}`),
    ...response.removedResources.map((name) => `-${name}`),
  ].sort();
}

/** Versions as a client holds them. */
export function versions(...responses: Response[]): Record<string, string> {
  const held: Record<string, string> = {};
  for (const { resources } of responses) {
    for (const { name, version } of resources) if (name && version) held[name] = version;
  }
  return held;
}

/** CreateCertificate. */
export function createCertificate(
  client: Client,
  metadata: Metadata,
  csr: string,
  identity: string | undefined,
  validityDuration = 0,
): Promise<string[]> {
  const fields: Record<string, google.protobuf.Value.$Properties> = {};
  if (identity !== undefined) fields.ImpersonatedIdentity = { stringValue: identity };
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(
      '/istio.v1.auth.IstioCertificateService/CreateCertificate',
      (request: istio.v1.auth.IstioCertificateRequest.$Properties) =>
        Buffer.from(IstioCertificateRequest.encode(request).finish()),
      (bytes) => IstioCertificateResponse.decode(bytes),
      { csr, validityDuration, metadata: { fields } },
      metadata,
      (error, response) => {
        if (error) reject(error);
        else resolve(response?.certChain ?? []);
      },
    );
  });
}
