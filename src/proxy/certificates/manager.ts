/** Certificates of the identities that have pods on this node: fetched before first use, renewed at half life, kept while valid. */
import { Backoff } from '../../mesh/backoff.js';
import type { Logger } from '../../mesh/log.js';
import type { CertificateBundle } from '../engine.js';
import type { CertificateSource } from './authority-client.js';
import type { CheckedCertificate } from './check.js';

/** Lower goes first. */
const REAL_TIME = 0;
const PREFETCH = 1;
const REFRESH = 2;
type Priority = typeof REAL_TIME | typeof PREFETCH | typeof REFRESH;

const MAX_IN_FLIGHT = 8;
const BACKOFF = { initialMs: 200, maxMs: 15_000 };
/** A retry before a certificate ends comes at the latest after this part of what remains of it. */
const REMAINING_PART = 8;
const SHORTEST_RETRY_MS = 200;
/** Longest delay of a timer. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** What the manager does with certificates. */
export interface CertificateSink {
  setCertificate(identity: string, bundle: CertificateBundle): void;
  removeCertificate(identity: string): void;
}

export type CertificateStateName = 'Initializing' | 'Available' | 'Unavailable';

/** One identity, for metrics and the config dump. No keys. */
export interface CertificateInfo {
  readonly identity: string;
  readonly state: CertificateStateName;
  readonly certificate?: Pick<CheckedCertificate, 'chain' | 'roots' | 'notAfterMs'>;
  /** Why the last attempt failed. */
  readonly error?: string;
}

interface Entry {
  readonly identity: string;
  readonly pods: Set<string>;
  readonly backoff: Backoff;
  certificate: Pick<CheckedCertificate, 'chain' | 'roots' | 'notAfterMs'> | undefined;
  error: string | undefined;
  /** Waiting for its turn, with this priority. */
  queued: Priority | undefined;
  inFlight: boolean;
  renewal: NodeJS.Timeout | undefined;
  expiry: NodeJS.Timeout | undefined;
}

export interface CertificateManagerOptions {
  readonly source: CertificateSource;
  readonly sink: CertificateSink;
  readonly log: Logger;
  /** Uniform in [0, 1); a test gives its own. */
  readonly random?: () => number;
}

export class CertificateManager {
  readonly #options: CertificateManagerOptions;
  readonly #entries = new Map<string, Entry>();
  #running = 0;
  #stopped = false;
  /** Requests by outcome, for metrics. */
  readonly counters = { fetched: 0, failed: 0 };

  constructor(options: CertificateManagerOptions) {
    this.#options = options;
  }

  /** A pod of this identity is on the node. The same pod may say so again. */
  acquire(identity: string, podUid: string): void {
    let entry = this.#entries.get(identity);
    if (entry === undefined) {
      entry = {
        identity,
        pods: new Set(),
        backoff: new Backoff({ ...BACKOFF, ...(this.#options.random ? { random: this.#options.random } : {}) }),
        certificate: undefined,
        error: undefined,
        queued: undefined,
        inFlight: false,
        renewal: undefined,
        expiry: undefined,
      };
      this.#entries.set(identity, entry);
      this.#enqueue(entry, PREFETCH);
    }
    entry.pods.add(podUid);
  }

  /** The pod is gone; the identity goes with its last pod. */
  release(identity: string, podUid: string): void {
    const entry = this.#entries.get(identity);
    if (entry === undefined || !entry.pods.delete(podUid) || entry.pods.size > 0) return;
    this.#entries.delete(identity);
    this.#clear(entry);
    if (entry.certificate !== undefined) this.#options.sink.removeCertificate(identity);
  }

  /**
   * A connection waits for this identity's certificate: it goes before all others. An attempt that waits for its backoff
   * stays so, that a certificate authority in trouble is not asked at the rate of connections.
   * @returns false where no pod of the identity is here: then there is nothing to be fetched
   */
  need(identity: string): boolean {
    const entry = this.#entries.get(identity);
    if (entry === undefined) return false;
    if (entry.queued !== undefined) entry.queued = REAL_TIME;
    return true;
  }

  /** The control plane is back: what failed is tried again now, a few at a time. */
  retryFailed(): void {
    for (const entry of this.#entries.values()) {
      if (entry.error === undefined || entry.inFlight || entry.queued !== undefined) continue;
      entry.backoff.reset();
      this.#enqueue(entry, entry.certificate === undefined ? REAL_TIME : REFRESH);
    }
  }

  list(): CertificateInfo[] {
    return [...this.#entries.values()].map(({ identity, certificate, error }) => ({
      identity,
      state: certificate !== undefined ? 'Available' : error === undefined ? 'Initializing' : 'Unavailable',
      ...(certificate === undefined ? {} : { certificate }),
      ...(error === undefined ? {} : { error }),
    }));
  }

  stop(): void {
    this.#stopped = true;
    for (const entry of this.#entries.values()) this.#clear(entry);
    this.#options.source.close();
  }

  #clear(entry: Entry): void {
    entry.queued = undefined;
    clearTimeout(entry.renewal);
    clearTimeout(entry.expiry);
  }

  #enqueue(entry: Entry, priority: Priority): void {
    clearTimeout(entry.renewal);
    entry.renewal = undefined;
    if (this.#stopped || entry.inFlight) return;
    entry.queued = priority;
    this.#pump();
  }

  #pump(): void {
    while (this.#running < MAX_IN_FLIGHT) {
      let next: Entry | undefined;
      for (const entry of this.#entries.values()) {
        if (entry.queued === undefined) continue;
        if (next?.queued === undefined || entry.queued < next.queued) next = entry;
        if (next.queued === REAL_TIME) break;
      }
      if (next === undefined) return;
      next.queued = undefined;
      void this.#fetch(next);
    }
  }

  async #fetch(entry: Entry): Promise<void> {
    this.#running++;
    entry.inFlight = true;
    try {
      const checked = await this.#options.source.fetch(entry.identity);
      if (this.#isCurrent(entry)) this.#install(entry, checked);
    } catch (error) {
      if (this.#isCurrent(entry)) this.#failed(entry, error as Error);
    } finally {
      entry.inFlight = false;
      this.#running--;
      this.#pump();
    }
  }

  #isCurrent(entry: Entry): boolean {
    return !this.#stopped && this.#entries.get(entry.identity) === entry;
  }

  #install(entry: Entry, checked: CheckedCertificate): void {
    this.#options.sink.setCertificate(entry.identity, checked.bundle);
    this.counters.fetched++;
    const { chain, roots, notAfterMs } = checked;
    const renewed = entry.certificate !== undefined;
    entry.certificate = { chain, roots, notAfterMs };
    entry.error = undefined;
    entry.backoff.reset();
    const remainingMs = notAfterMs - Date.now();
    const random = this.#options.random ?? Math.random;
    // Half of what remains, not of what the certificate says: it may be backdated by more than it lasts.
    const renewInMs = (remainingMs / 2) * (0.95 + 0.1 * random());
    this.#arm(entry, renewInMs, REFRESH);
    clearTimeout(entry.expiry);
    entry.expiry = timer(() => this.#expired(entry), remainingMs);
    this.#options.log.info(
      {
        event: 'certificate_installed',
        identity: entry.identity,
        serial: chain[0]?.serialNumber,
        notAfter: new Date(notAfterMs).toISOString(),
        renewInMs: Math.round(renewInMs),
        roots: roots.length,
        renewed,
      },
      'installed a certificate',
    );
  }

  #failed(entry: Entry, error: Error): void {
    this.counters.failed++;
    entry.error = error.message;
    let delayMs = entry.backoff.next();
    const remainingMs = entry.certificate === undefined ? 0 : entry.certificate.notAfterMs - Date.now();
    if (remainingMs > 0) delayMs = Math.min(delayMs, Math.max(SHORTEST_RETRY_MS, remainingMs / REMAINING_PART));
    this.#arm(entry, delayMs, remainingMs > 0 ? REFRESH : REAL_TIME);
    this.#options.log.warn(
      {
        event: 'certificate_failed',
        identity: entry.identity,
        error: error.message,
        retryInMs: Math.round(delayMs),
        ...(remainingMs > 0 ? { validForMs: Math.round(remainingMs) } : {}),
        hint: 'check that the certificate authority (CA_ADDRESS) runs, and that AUTH_TOKEN is of the node this pod runs on',
      },
      remainingMs > 0
        ? 'could not renew a certificate; the one at hand stays in use'
        : 'could not get a certificate; connections of this identity are refused',
    );
  }

  #arm(entry: Entry, delayMs: number, priority: Priority): void {
    clearTimeout(entry.renewal);
    entry.renewal = timer(() => this.#enqueue(entry, priority), delayMs);
  }

  #expired(entry: Entry): void {
    if (!this.#isCurrent(entry) || entry.certificate === undefined) return;
    if (entry.certificate.notAfterMs > Date.now()) {
      // A timer cannot be as long as some certificates live.
      entry.expiry = timer(() => this.#expired(entry), entry.certificate.notAfterMs - Date.now());
      return;
    }
    entry.certificate = undefined;
    this.#options.sink.removeCertificate(entry.identity);
    this.#options.log.error(
      { event: 'certificate_expired', identity: entry.identity, hint: 'see the certificate_failed lines before this' },
      'a certificate ended before it could be renewed; connections of this identity are refused',
    );
    if (!entry.inFlight) this.#enqueue(entry, REAL_TIME);
  }
}

function timer(callback: () => void, delayMs: number): NodeJS.Timeout {
  return setTimeout(callback, Math.min(Math.max(1, delayMs), MAX_TIMER_MS));
}
