/** IstioCertificateService: who may have a certificate of whom. */
import {
  type Metadata,
  ServerInterceptingCall,
  type ServerInterceptor,
  type ServerUnaryCall,
  type sendUnaryData,
  status,
} from '@grpc/grpc-js';
import { type Identity, parseIdentity } from '../mesh/identity.js';
import type { Logger } from '../mesh/log.js';
import type { istio } from '../mesh/proto/generated.js';
import { type Authority, grantedTtl } from './authority.js';
import { type Caller, type Callers, Refusal, Unavailable } from './callers.js';
import { publicKeyOfRequest } from './csr.js';
import { bearerToken, certificateService, grpcError } from './grpc.js';

type Request = istio.v1.auth.IstioCertificateRequest;
type Response = istio.v1.auth.IstioCertificateResponse.$Properties;

export interface CertificateServiceOptions {
  readonly log: Logger;
  readonly authority: () => Authority;
  readonly trustDomain: string;
  /** Longest and default lifetime of a certificate. */
  readonly ttlSeconds: number;
  readonly callers: Callers;
}

/** Requests that are signed at once; further ones are told to come again. */
const MAX_CONCURRENT = 256;
const UNAVAILABLE = { code: status.UNAVAILABLE, details: 'cannot authenticate now' };
const REFUSED = { code: status.UNAUTHENTICATED, details: 'request authentication failure' };

/**
 * Looks at the token of a CreateCertificate call before any of its message is read: the limit of a message's size is one
 * that only xDS needs, and nobody without a token is to make the controller hold so much.
 */
export function certificateGate({
  log,
  callers,
}: Pick<CertificateServiceOptions, 'log' | 'callers'>): ServerInterceptor {
  return (method, call) => {
    if (method.path !== certificateService.createCertificate.path) return new ServerInterceptingCall(call);
    return new ServerInterceptingCall(call, {
      start: (next) =>
        next({
          onReceiveMetadata: (metadata, pass) => {
            authenticate(metadata, callers).then(
              () => pass(metadata),
              (error: unknown) => {
                const fields = { peer: call.getPeer(), reason: (error as Error).message };
                log.warn({ event: 'ca_refused', ...fields }, 'refused a certificate');
                call.sendStatus(error instanceof Refusal ? REFUSED : UNAVAILABLE);
              },
            );
          },
        }),
    });
  };
}

/** Who has the token that a call carries. @throws Refusal, Unavailable */
async function authenticate(metadata: Metadata, callers: Callers): Promise<Caller> {
  const token = bearerToken(metadata);
  if (token === undefined) throw new Refusal('no bearer token');
  return callers.authenticate(token);
}

/** Handler of CreateCertificate. */
export function certificateHandler(options: CertificateServiceOptions) {
  let running = 0;
  return (call: ServerUnaryCall<Request, Response>, callback: sendUnaryData<Response>): void => {
    if (running >= MAX_CONCURRENT) {
      callback(grpcError(status.RESOURCE_EXHAUSTED, 'too many certificate requests at once, try again'));
      return;
    }
    running++;
    createCertificate(options, call)
      .then(
        (response) => callback(null, response),
        (error: unknown) => {
          const fields = { peer: call.getPeer(), identity: impersonated(call.request)?.slice(0, 512) };
          if (error instanceof Refusal) {
            options.log.warn({ event: 'ca_refused', ...fields, reason: error.message }, 'refused a certificate');
            callback(grpcError(REFUSED.code, REFUSED.details));
          } else if (error instanceof Unavailable) {
            options.log.error({ event: 'ca_unavailable', ...fields, reason: error.message }, 'cannot tell who asks');
            callback(grpcError(UNAVAILABLE.code, UNAVAILABLE.details));
          } else {
            options.log.error({ event: 'ca_failed', ...fields, err: error }, 'could not sign a certificate');
            callback(grpcError(status.INTERNAL, 'the certificate could not be signed'));
          }
        },
      )
      .finally(() => {
        running--;
      });
  };
}

async function createCertificate(
  { log, authority, trustDomain, ttlSeconds, callers }: CertificateServiceOptions,
  call: ServerUnaryCall<Request, Response>,
): Promise<Response> {
  const { node } = await authenticate(call.metadata, callers);
  const identity = readIdentity(impersonated(call.request), trustDomain);
  if (!callers.runsOn(node, identity.namespace, identity.serviceAccount)) {
    throw new Refusal(`no pod of ${identity.namespace}/${identity.serviceAccount} is scheduled on node ${node}`);
  }
  const publicKey = await publicKeyOfRequest(call.request.csr).catch((error: unknown) => {
    throw new Refusal((error as Error).message);
  });
  // int64: a Long object where the generated code has that class at hand, a number else.
  const requested = Number(String(call.request.validityDuration));
  const signed = await authority().signWorkload(identity, publicKey, grantedTtl(requested, ttlSeconds));
  log.info(
    {
      event: 'ca_signed',
      node,
      namespace: identity.namespace,
      serviceAccount: identity.serviceAccount,
      serial: signed.serialNumber,
      notAfter: signed.notAfter.toISOString(),
    },
    'signed a certificate',
  );
  return { certChain: [...signed.chain] };
}

function impersonated(request: Request): string | undefined {
  return request.metadata?.fields?.ImpersonatedIdentity?.stringValue ?? undefined;
}

/** A label of a namespace or service account: what may not be in there cannot be in the SAN either. */
const NAME = /^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/;

function readIdentity(uri: string | undefined, trustDomain: string): Identity {
  if (uri === undefined) throw new Refusal('the request names no ImpersonatedIdentity');
  const identity = parseIdentity(uri);
  if (identity === undefined) throw new Refusal('the requested identity is not a SPIFFE identity of a service account');
  if (identity.trustDomain !== trustDomain) {
    throw new Refusal(`the requested identity is of trust domain ${identity.trustDomain}, ours is ${trustDomain}`);
  }
  if (!NAME.test(identity.namespace) || !NAME.test(identity.serviceAccount)) {
    throw new Refusal('the requested identity names no possible namespace and service account');
  }
  return identity;
}
