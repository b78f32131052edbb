/** What proxies and a control plane agree on: type URLs and gRPC methods, defined by hand over the generated messages. */
import type { MethodDefinition } from '@grpc/grpc-js';
import { envoy, istio } from './proto/generated.js';

/** Workloads and Services of WDS. */
export const ADDRESS_TYPE = 'type.googleapis.com/istio.workload.Address';
/** Policies. */
export const AUTHORIZATION_TYPE = 'type.googleapis.com/istio.security.Authorization';
export type TypeUrl = typeof ADDRESS_TYPE | typeof AUTHORIZATION_TYPE;

/** What is encoded needs not name every field; what was decoded has them all. */
type Method<Request, Encodable, Answer, EncodableAnswer> = Omit<
  MethodDefinition<Encodable, EncodableAnswer>,
  'requestDeserialize' | 'responseDeserialize'
> &
  Pick<MethodDefinition<Request, Answer>, 'requestDeserialize' | 'responseDeserialize'>;

const { DeltaDiscoveryRequest } = envoy.service.discovery.v3;
const { IstioCertificateRequest, IstioCertificateResponse } = istio.v1.auth;

const asBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/**
 * Delta xDS. Responses stay bytes on both sides: the server's stream encodes them itself, and to the client what cannot
 * be decoded is the stream's business.
 */
export const deltaAggregatedResources: Method<
  envoy.service.discovery.v3.DeltaDiscoveryRequest,
  envoy.service.discovery.v3.DeltaDiscoveryRequest.$Properties,
  Buffer,
  Uint8Array
> = {
  path: '/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources',
  requestStream: true,
  responseStream: true,
  requestSerialize: (request) => asBuffer(DeltaDiscoveryRequest.encode(request).finish()),
  requestDeserialize: (bytes) => DeltaDiscoveryRequest.decode(bytes),
  responseSerialize: asBuffer,
  responseDeserialize: (bytes) => bytes,
};

/** Signing of certificates. */
export const createCertificate: Method<
  istio.v1.auth.IstioCertificateRequest,
  istio.v1.auth.IstioCertificateRequest.$Properties,
  istio.v1.auth.IstioCertificateResponse,
  istio.v1.auth.IstioCertificateResponse.$Properties
> = {
  path: '/istio.v1.auth.IstioCertificateService/CreateCertificate',
  requestStream: false,
  responseStream: false,
  requestSerialize: (request) => asBuffer(IstioCertificateRequest.encode(request).finish()),
  requestDeserialize: (bytes) => IstioCertificateRequest.decode(bytes),
  responseSerialize: (response) => asBuffer(IstioCertificateResponse.encode(response).finish()),
  responseDeserialize: (bytes) => IstioCertificateResponse.decode(bytes),
};
