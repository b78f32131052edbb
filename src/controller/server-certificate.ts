/** The controller's own server certificate: issued by its authority, replaced in the running server before it expires. */
import { networkInterfaces } from 'node:os';
import { experimental, type ServerCredentials } from '@grpc/grpc-js';
import type { Logger } from '../mesh/log.js';
import type { Authority } from './authority.js';
import type { ListenAddress } from './settings.js';

const TTL_SECONDS = 86_400;
const RETRY_MS = 60_000;
/** An authority that is about to end cannot issue what lasts; it is not asked all the time. */
const SHORTEST_MS = 250;

/** Names under which proxies may know the controller: where it listens, the loopback, istiod's name and its own. */
export function serverNames(listen: ListenAddress, clusterDomain: string, further: readonly string[] = []): string[] {
  const names = new Set(['localhost', '127.0.0.1', '::1', ...further]);
  if (listen.host === '0.0.0.0' || listen.host === '::') {
    for (const address of Object.values(networkInterfaces()).flat()) {
      if (address !== undefined && !address.address.includes('%')) names.add(address.address);
    }
  } else names.add(listen.host);
  for (const service of ['istiod.istio-system', 'ebbtide-controller.ebbtide-system']) {
    names.add(service);
    names.add(`${service}.svc`);
    names.add(`${service}.svc.${clusterDomain}`);
  }
  return [...names];
}

/** gRPC credentials whose certificate renews itself. */
export interface RenewingCredentials {
  readonly credentials: ServerCredentials;
  /** Issues another certificate now: the authority has changed. Never rejects; what fails is tried again. */
  renew(): Promise<void>;
  close(): void;
}

/** Issues the first certificate and goes on to renew it at half of its life. */
export async function renewingCredentials(
  authority: () => Authority,
  names: readonly string[],
  log: Logger,
  ttlSeconds: number = TTL_SECONDS,
): Promise<RenewingCredentials> {
  const listeners = new Set<experimental.IdentityCertificateUpdateListener>();
  let current: experimental.IdentityCertificateUpdate;
  let timer: NodeJS.Timeout | undefined;
  let closed = false;

  const renew = async (): Promise<void> => {
    clearTimeout(timer);
    const issued = await authority().issueServer(names, ttlSeconds);
    current = { certificate: Buffer.from(issued.certificate), privateKey: Buffer.from(issued.privateKey) };
    for (const listener of listeners) listener(current);
    log.info({ event: 'server_certificate', names, notAfter: issued.notAfter.toISOString() }, 'issued own certificate');
    const remainingMs = issued.notAfter.getTime() - Date.now();
    schedule(remainingMs > 0 ? Math.max(SHORTEST_MS, remainingMs / 2) : RETRY_MS);
  };
  const renewOrRetry = (): Promise<void> =>
    renew().catch((error: unknown) => {
      log.error({ event: 'server_certificate_failed', err: error }, 'could not renew own certificate; trying again');
      schedule(RETRY_MS);
    });
  const schedule = (delay: number): void => {
    if (closed) return;
    clearTimeout(timer);
    timer = setTimeout(() => void renewOrRetry(), delay);
    timer.unref();
  };
  await renew();

  const provider: experimental.CertificateProvider = {
    addCaCertificateListener: () => {},
    removeCaCertificateListener: () => {},
    addIdentityCertificateListener(listener) {
      listeners.add(listener);
      // Later, because the credentials register what is to be told of it only after this call.
      queueMicrotask(() => listener(current));
    },
    removeIdentityCertificateListener: (listener) => void listeners.delete(listener),
  };
  return {
    // The declaration names the parameters the other way round: identity comes first, and there are no client certificates.
    credentials: experimental.createCertificateProviderServerCredentials(provider, null, false),
    renew: renewOrRetry,
    close() {
      closed = true;
      clearTimeout(timer);
    },
  };
}
