/**
 * Certificates of the identities that have pods on this node: fetched before first use, renewed at half life, kept while valid.
 * How long a certificate lasts is measured from when it came, by a clock that nobody sets: the wall clock may be wrong or jump
 * without a certificate being renewed too late, or used for too long. What it says besides is told.
 */
import { Backoff } from '../../mesh/backoff.js';
import { type Clock, roughly, SYSTEM_CLOCK } from '../../mesh/clock.js';
import { isRefusedForTime } from '../../mesh/clock-skew.js';
import type { Logger } from '../../mesh/log.js';
import type { CertificateBundle } from '../engine.js';
import type { CertificateSource } from './authority-client.js';
import { type CheckedCertificate, ClockSkewError } from './check.js';

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
/** By a wrong clock the authority is not asked more often; when it is set right, that is noticed at once. */
const SKEW_RETRY_MS = 60_000;
const LONGEST_SKEW_RETRY_MS = 900_000;
/** Longest delay of a timer. */
const MAX_TIMER_MS = 2 ** 31 - 1;
/** Timers and the clock are not of one kind, and may differ by this much. */
const EARLY_MS = 50;

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

interface Installed extends Pick<CheckedCertificate, 'chain' | 'roots' | 'notBeforeMs' | 'notAfterMs'> {
  /** By the clock that only goes on. */
  readonly renewAtMs: number;
  readonly endsAtMs: number;
}

interface Entry {
  readonly identity: string;
  readonly pods: Set<string>;
  readonly backoff: Backoff;
  certificate: Installed | undefined;
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
  readonly clock?: Clock;
}

export class CertificateManager {
  readonly #options: CertificateManagerOptions;
  readonly #clock: Clock;
  readonly #entries = new Map<string, Entry>();
  #running = 0;
  #stopped = false;
  /** Requests by outcome, for metrics. */
  readonly counters = { fetched: 0, failed: 0 };

  constructor(options: CertificateManagerOptions) {
    this.#options = options;
    this.#clock = options.clock ?? SYSTEM_CLOCK;
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

  /**
   * The wall clock was set, or the machine slept. What failed for the time is tried again, and what has ended or is past its
   * half by the clock as it is now is renewed; meanwhile it stays in use for as long as it lasts by the other clock.
   */
  clockJumped(): void {
    const wallMs = this.#clock.wallMs();
    for (const entry of this.#entries.values()) {
      const { certificate } = entry;
      if (certificate === undefined) continue;
      if (this.#clock.elapsedMs() >= certificate.endsAtMs) {
        this.#expired(entry);
        continue;
      }
      const { notBeforeMs, notAfterMs } = certificate;
      const state = wallMs < notBeforeMs ? 'is not valid yet' : wallMs >= notAfterMs ? 'has ended' : undefined;
      if (state !== undefined) {
        this.#options.log.warn(
          {
            event: 'certificate_out_of_time',
            identity: entry.identity,
            notBefore: new Date(notBeforeMs).toISOString(),
            notAfter: new Date(notAfterMs).toISOString(),
            hint: 'clock skew? It is asked for anew now; see the clock_jumped and clock_skew lines',
          },
          `by the clock as it was set now a certificate ${state}; it stays in use, its peers judge it by their own clocks`,
        );
      }
      if (entry.error === undefined && (state !== undefined || wallMs > (notBeforeMs + notAfterMs) / 2)) {
        this.#enqueue(entry, REFRESH);
      }
    }
    this.retryFailed();
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

  /** @param endsAtMs by the clock that only goes on */
  #install(entry: Entry, checked: CheckedCertificate, endsAtMs = this.#clock.elapsedMs() + checked.remainingMs): void {
    const { chain, roots, notBeforeMs, notAfterMs } = checked;
    const nowMs = this.#clock.elapsedMs();
    const remainingMs = endsAtMs - nowMs;
    const aheadMs = notBeforeMs - this.#clock.wallMs();
    const { certificate } = entry;
    // What is valid here is not given up for what is not: the authority's clock may be the wrong one.
    if (aheadMs > 0 && certificate !== undefined && certificate.notBeforeMs <= this.#clock.wallMs()) {
      if (aheadMs > LONGEST_SKEW_RETRY_MS) {
        throw new ClockSkewError(
          `clock skew: by the clock here the certificate that was signed now is not valid for another ${roughly(aheadMs)}`,
        );
      }
      if (certificate.endsAtMs - nowMs > aheadMs) {
        clearTimeout(entry.renewal);
        entry.renewal = timer(() => this.#installLater(entry, checked, endsAtMs), aheadMs + EARLY_MS);
        return;
      }
    }
    this.#options.sink.setCertificate(entry.identity, checked.bundle);
    this.counters.fetched++;
    const renewed = entry.certificate !== undefined;
    const random = this.#options.random ?? Math.random;
    // Half of what remains, not of what the certificate says: it may be backdated by more than it lasts.
    const renewInMs = (remainingMs / 2) * (0.95 + 0.1 * random());
    entry.certificate = { chain, roots, notBeforeMs, notAfterMs, renewAtMs: nowMs + renewInMs, endsAtMs };
    entry.error = undefined;
    entry.backoff.reset();
    // It may be the authority's clock that is wrong, and peers refuse what it signed until then.
    this.#arm(entry, aheadMs > 0 ? Math.min(renewInMs, skewRetryMs(aheadMs)) : renewInMs, REFRESH);
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
        ...(aheadMs > 0 ? { notValidForMs: Math.round(aheadMs) } : {}),
      },
      aheadMs > 0
        ? 'installed a certificate that is not valid yet by the clock here (clock skew); peers judge it by their own clocks'
        : 'installed a certificate',
    );
  }

  /** What had to wait until it was valid by the clock here. */
  #installLater(entry: Entry, checked: CheckedCertificate, endsAtMs: number): void {
    if (!this.#isCurrent(entry)) return;
    try {
      this.#install(entry, checked, endsAtMs);
    } catch (error) {
      this.#failed(entry, error as Error);
    }
  }

  #failed(entry: Entry, error: Error): void {
    this.counters.failed++;
    entry.error = error.message;
    let delayMs = entry.backoff.next();
    const remainingMs = entry.certificate === undefined ? 0 : entry.certificate.endsAtMs - this.#clock.elapsedMs();
    if (error instanceof ClockSkewError) delayMs = SKEW_RETRY_MS;
    if (remainingMs > 0) delayMs = Math.min(delayMs, Math.max(SHORTEST_RETRY_MS, remainingMs / REMAINING_PART));
    this.#arm(entry, delayMs, remainingMs > 0 ? REFRESH : REAL_TIME);
    this.#options.log.warn(
      {
        event: 'certificate_failed',
        identity: entry.identity,
        error: error.message,
        retryInMs: Math.round(delayMs),
        ...(remainingMs > 0 ? { validForMs: Math.round(remainingMs) } : {}),
        hint: hintFor(error),
      },
      remainingMs > 0
        ? 'could not renew a certificate; the one at hand stays in use'
        : 'could not get a certificate; connections of this identity are refused',
    );
  }

  #arm(entry: Entry, delayMs: number, priority: Priority): void {
    clearTimeout(entry.renewal);
    entry.renewal = timer(() => this.#due(entry, priority), delayMs);
  }

  #due(entry: Entry, priority: Priority): void {
    const { certificate, error } = entry;
    const waitMs = (certificate?.renewAtMs ?? 0) - this.#clock.elapsedMs();
    // A timer cannot be as long as some certificates live; and one that was not valid yet may be so by now.
    if (error === undefined && certificate !== undefined && waitMs > EARLY_MS) {
      const aheadMs = certificate.notBeforeMs - this.#clock.wallMs();
      if (aheadMs <= 0) {
        this.#arm(entry, waitMs, priority);
        return;
      }
    }
    this.#enqueue(entry, priority);
  }

  #expired(entry: Entry): void {
    if (!this.#isCurrent(entry) || entry.certificate === undefined) return;
    const remainingMs = entry.certificate.endsAtMs - this.#clock.elapsedMs();
    if (remainingMs > EARLY_MS) {
      // A timer cannot be as long as some certificates live.
      entry.expiry = timer(() => this.#expired(entry), remainingMs);
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

/** For how long to leave the authority alone whose certificates begin so much later by the clock here. */
const skewRetryMs = (aheadMs: number): number => Math.max(SKEW_RETRY_MS, Math.min(aheadMs, LONGEST_SKEW_RETRY_MS));

function hintFor(error: Error): string {
  if (error instanceof ClockSkewError || isRefusedForTime(error.message)) {
    return 'clock skew: see the clock_skew line; it is tried again as soon as the clock is set';
  }
  return 'check that the certificate authority (CA_ADDRESS) runs, and that AUTH_TOKEN is of the node this pod runs on';
}

function timer(callback: () => void, delayMs: number): NodeJS.Timeout {
  return setTimeout(callback, Math.min(Math.max(1, delayMs), MAX_TIMER_MS));
}
