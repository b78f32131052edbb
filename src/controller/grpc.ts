/** The two gRPC services of the controller, and the caller's credentials. */
import type { Metadata, ServerErrorResponse, status } from '@grpc/grpc-js';
import { createCertificate, deltaAggregatedResources } from '../mesh/control-plane.js';

export const discoveryService = { deltaAggregatedResources };
/** A CSR is a few KiB, also with the largest key that is signed. */
export const MAX_CERTIFICATE_REQUEST_BYTES = 64 << 10;
export const certificateService = {
  createCertificate: {
    ...createCertificate,
    requestDeserialize: (bytes: Buffer): ReturnType<typeof createCertificate.requestDeserialize> => {
      if (bytes.length > MAX_CERTIFICATE_REQUEST_BYTES) throw new RangeError(`a request of ${bytes.length} bytes`);
      return createCertificate.requestDeserialize(bytes);
    },
  },
};

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
