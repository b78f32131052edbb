/** A scripted control plane for tests of the proxy: real gRPC over real TLS, answers as the test wants them. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  Server,
  ServerCredentials,
  type ServerDuplexStream,
  type ServerUnaryCall,
  type sendUnaryData,
} from '@grpc/grpc-js';
import { pino } from 'pino';
import { type Authority, createAuthority } from '../../src/controller/authority.ts';
import { certificateService, discoveryService } from '../../src/controller/grpc.ts';
import { loadRoot } from '../../src/controller/root.ts';
import { envoy, istio } from '../../src/mesh/proto/generated.js';
import type { ControlPlaneSettings } from '../../src/proxy/settings.ts';

export type DeltaRequest = envoy.service.discovery.v3.DeltaDiscoveryRequest;
export type XdsCall = ServerDuplexStream<DeltaRequest, Uint8Array>;
type CertificateCall = ServerUnaryCall<
  istio.v1.auth.IstioCertificateRequest,
  istio.v1.auth.IstioCertificateResponse.$Properties
>;
type CertificateCallback = sendUnaryData<istio.v1.auth.IstioCertificateResponse.$Properties>;

export const ADDRESS = 'type.googleapis.com/istio.workload.Address';
export const POLICY = 'type.googleapis.com/istio.security.Authorization';
export const silent = pino({ level: 'silent' });

export class Peer {
  readonly directory: string;
  readonly authority: Authority;
  port = 0;
  #server: Server | undefined;
  onStream: (call: XdsCall) => void = () => {};
  onCertificate: (call: CertificateCall, callback: CertificateCallback) => void = (_, callback) =>
    callback({ code: 12, details: 'not scripted' });

  private constructor(directory: string, authority: Authority) {
    this.directory = directory;
    this.authority = authority;
  }

  static async start(): Promise<Peer> {
    const directory = mkdtempSync(join(tmpdir(), 'proxy-peer-'));
    const peer = new Peer(directory, createAuthority(await loadRoot(join(directory, 'data'))));
    writeFileSync(join(directory, 'root.pem'), peer.authority.bundle);
    writeFileSync(join(directory, 'token'), 'first-token\n');
    await peer.listen();
    return peer;
  }

  async listen(): Promise<void> {
    const server = new Server();
    server.addService(discoveryService, { deltaAggregatedResources: (call: XdsCall) => this.onStream(call) });
    server.addService(certificateService, {
      createCertificate: (call: CertificateCall, callback: CertificateCallback) => this.onCertificate(call, callback),
    });
    const { certificate, privateKey } = await this.authority.issueServer(['localhost', '127.0.0.1'], 3600);
    const pair = { cert_chain: Buffer.from(certificate), private_key: Buffer.from(privateKey) };
    this.port = await new Promise((resolve, reject) => {
      server.bindAsync(`127.0.0.1:${this.port}`, ServerCredentials.createSsl(null, [pair]), (error, port) =>
        error ? reject(error) : resolve(port),
      );
    });
    this.#server = server;
  }

  /** The server goes away; `listen` brings it back on the same port. */
  leave(): void {
    this.#server?.forceShutdown();
    this.#server = undefined;
  }

  stop(): void {
    this.leave();
    rmSync(this.directory, { recursive: true, force: true });
  }

  settings(): ControlPlaneSettings {
    return {
      host: '127.0.0.1',
      port: this.port,
      rootCa: join(this.directory, 'root.pem'),
      altHostname: '',
      authToken: join(this.directory, 'token'),
      clusterId: 'Kubernetes',
      headers: new Map([['x-test', 'yes']]),
    };
  }
}

/** An encoded delta response. */
export function response(
  typeUrl: string,
  nonce: string,
  resources: readonly { name: string; version?: string; value: Uint8Array }[],
  removedResources: readonly string[] = [],
): Uint8Array {
  return envoy.service.discovery.v3.DeltaDiscoveryResponse.encode({
    typeUrl,
    nonce,
    resources: resources.map(({ name, version = '1', value }) => ({
      name,
      version,
      resource: { type_url: typeUrl, value },
    })),
    removedResources: [...removedResources],
  }).finish();
}

export const workload = (properties: istio.workload.Workload.$Properties): Uint8Array =>
  istio.workload.Address.encode({ workload: properties }).finish();
export const service = (properties: istio.workload.Service.$Properties): Uint8Array =>
  istio.workload.Address.encode({ service: properties }).finish();
export const policy = (properties: istio.security.Authorization.$Properties): Uint8Array =>
  istio.security.Authorization.encode(properties).finish();

/** Waits until a condition holds. */
export async function until(condition: () => boolean, what = 'a condition', ms = 8000): Promise<void> {
  const deadline = Date.now() + ms;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`waited ${ms} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
