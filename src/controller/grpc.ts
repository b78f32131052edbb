/** The two gRPC services of the controller, defined by hand over the generated messages, and the caller's credentials. */
import type { Metadata, MethodDefinition, ServerErrorResponse, status } from '@grpc/grpc-js';
import { envoy, istio } from '../mesh/proto/generated.js';

type DeltaDiscoveryRequest = envoy.service.discovery.v3.DeltaDiscoveryRequest;
type IstioCertificateRequest = istio.v1.auth.IstioCertificateRequest;
type IstioCertificateResponse = istio.v1.auth.IstioCertificateResponse.$Properties;

const asBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Responses are encoded by the stream that makes them, hence bytes here. */
const deltaAggregatedResources: MethodDefinition<DeltaDiscoveryRequest, Uint8Array> = {
  path: '/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources',
  requestStream: true,
  responseStream: true,
  requestSerialize: (request) => asBuffer(envoy.service.discovery.v3.DeltaDiscoveryRequest.encode(request).finish()),
  requestDeserialize: (bytes) => envoy.service.discovery.v3.DeltaDiscoveryRequest.decode(bytes),
  responseSerialize: asBuffer,
  responseDeserialize: (bytes) => bytes,
};

const createCertificate: MethodDefinition<IstioCertificateRequest, IstioCertificateResponse> = {
  path: '/istio.v1.auth.IstioCertificateService/CreateCertificate',
  requestStream: false,
  responseStream: false,
  requestSerialize: (request) => asBuffer(istio.v1.auth.IstioCertificateRequest.encode(request).finish()),
  requestDeserialize: (bytes) => istio.v1.auth.IstioCertificateRequest.decode(bytes),
  responseSerialize: (response) => asBuffer(istio.v1.auth.IstioCertificateResponse.encode(response).finish()),
  responseDeserialize: (bytes) => istio.v1.auth.IstioCertificateResponse.decode(bytes),
};

export const discoveryService = { deltaAggregatedResources };
export const certificateService = { createCertificate };

/** The bearer token of a call, or undefined where there is not exactly one. */
export function bearerToken(metadata: Metadata): string | undefined {
  const values = metadata.get('authorization');
  const value = values[0];
  if (values.length !== 1 || typeof value !== 'string') return undefined;
  return /^Bearer ([A-Za-z0-9._~+/=-]{1,4096})$/i.exec(value)?.[1];
}

/** A status for the client; it says no more than the code where the reason is none of the caller's business. */
export function grpcError(code: status, details: string): ServerErrorResponse {
  return Object.assign(new Error(details), { code, details });
}
