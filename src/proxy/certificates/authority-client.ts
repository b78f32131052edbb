/** Calls to the certificate authority (IstioCertificateService). */
import { type Client, status } from '@grpc/grpc-js';
import { type Clock, type ClockOffset, now, offsetByDate, SYSTEM_CLOCK } from '../../mesh/clock.js';
import { createCertificate } from '../../mesh/control-plane.js';
import { callMetadata, openChannel, readRoots } from '../control-plane.js';
import type { ControlPlaneSettings } from '../settings.js';
import { type CheckedCertificate, checkCertificate } from './check.js';
import { makeCsr, newKey } from './csr.js';

const DEADLINE_MS = 10_000;

/** Where certificates come from. */
export interface CertificateSource {
  /** A new key and certificate for an identity (SPIFFE URI). Rejects with what went wrong. */
  fetch(identity: string): Promise<CheckedCertificate>;
  close(): void;
}

export interface AuthorityClientOptions {
  /** Told how far the authority's clock is ahead, with each answer that says so. */
  readonly onTime?: (offset: ClockOffset) => void;
  /** Told of each call that failed. */
  readonly onFailure?: (error: Error) => void;
  readonly clock?: Clock;
}

export class AuthorityClient implements CertificateSource {
  readonly #settings: ControlPlaneSettings;
  readonly #ttlSeconds: number;
  readonly #options: AuthorityClientOptions;
  #channel: { readonly client: Client; readonly roots: string | undefined } | undefined;

  constructor(settings: ControlPlaneSettings, ttlSeconds: number, options: AuthorityClientOptions = {}) {
    this.#settings = settings;
    this.#ttlSeconds = ttlSeconds;
    this.#options = options;
  }

  async fetch(identity: string): Promise<CheckedCertificate> {
    const keys = await newKey();
    const csr = makeCsr(identity, keys);
    const client = this.#connect();
    const request = {
      csr,
      validityDuration: this.#ttlSeconds,
      metadata: { fields: { ImpersonatedIdentity: { stringValue: identity } } },
    };
    const metadata = callMetadata(this.#settings);
    const { onTime, onFailure, clock = SYSTEM_CLOCK } = this.#options;
    const sent = now(clock);
    let offset: ClockOffset | undefined;
    const chain = await new Promise<readonly string[]>((resolve, reject) => {
      const { path, requestSerialize, responseDeserialize } = createCertificate;
      const deadline = Date.now() + DEADLINE_MS;
      const call = client.makeUnaryRequest(
        path,
        requestSerialize,
        responseDeserialize,
        request,
        metadata,
        { deadline },
        (error, answer) => {
          if (error !== null) {
            // A channel that does not connect may need the roots as they are now, or the name resolved anew.
            if (error.code === status.UNAVAILABLE) this.#drop(client);
            onFailure?.(error);
            reject(error);
          } else resolve(answer?.certChain ?? []);
        },
      );
      call.on('metadata', (told) => {
        offset = offsetByDate(told.get('date')[0], sent, now(clock));
        if (offset !== undefined) onTime?.(offset);
      });
    });
    return checkCertificate(identity, chain, keys.privateKey, { wallMs: clock.wallMs(), offset });
  }

  close(): void {
    this.#channel?.client.close();
    this.#channel = undefined;
  }

  /** The channel, opened anew when the root file changed. */
  #connect(): Client {
    const roots = readRoots(this.#settings.rootCa);
    if (this.#channel !== undefined && this.#channel.roots !== roots) this.close();
    this.#channel ??= { client: openChannel(this.#settings, roots), roots };
    return this.#channel.client;
  }

  #drop(client: Client): void {
    if (this.#channel?.client !== client) return;
    // Calls that are under way on it end by themselves.
    this.close();
  }
}
