/** Which of several replicas writes: the one that holds a Lease (coordination.k8s.io), by the rules of client-go's election. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Api, ApiError } from '../../mesh/api/index.js';
import type { Logger } from '../../mesh/log.js';

interface Lease {
  readonly metadata: { readonly name: string; readonly resourceVersion?: string };
  readonly spec?: {
    readonly holderIdentity?: string;
    readonly leaseDurationSeconds?: number;
    readonly acquireTime?: string;
    readonly renewTime?: string;
    readonly leaseTransitions?: number;
  };
}

export interface LeaseTimes {
  /** Others take over when the holder has not renewed for so long. */
  readonly durationMs: number;
  /** A holder that could not renew for so long stops to write, before others may begin. */
  readonly deadlineMs: number;
  /** Pause between two looks. */
  readonly retryMs: number;
}

/** client-go's defaults. */
const DEFAULT_TIMES: LeaseTimes = { durationMs: 15_000, deadlineMs: 10_000, retryMs: 2000 };

export interface ElectionOptions {
  readonly api: Api;
  readonly namespace: string;
  /** Of the Lease. */
  readonly name: string;
  /** Of this replica; no two may have the same. */
  readonly identity: string;
  readonly log: Logger;
  /** Called when this replica begins and ceases to lead. */
  changed(leading: boolean): void;
  readonly times?: Partial<LeaseTimes> | undefined;
}

export class Election {
  readonly #options: ElectionOptions;
  readonly #times: LeaseTimes;
  readonly #path: string;
  readonly #stop = new AbortController();
  #leading = false;
  /** When the holder was last seen to renew, by our own clock: clocks of machines are never compared. */
  #seen: { readonly version: string; readonly at: number } | undefined;
  #expiry: NodeJS.Timeout | undefined;
  #running: Promise<void> | undefined;

  constructor(options: ElectionOptions) {
    this.#options = options;
    this.#times = { ...DEFAULT_TIMES, ...options.times };
    this.#path = `/apis/coordination.k8s.io/v1/namespaces/${options.namespace}/leases`;
  }

  get leading(): boolean {
    return this.#leading;
  }

  start(): void {
    this.#running = this.#run();
  }

  /** Gives the Lease back, so that another replica need not wait for it to run out. */
  async close(): Promise<void> {
    this.#stop.abort();
    await this.#running;
  }

  async #run(): Promise<void> {
    while (!this.#stop.signal.aborted) {
      try {
        const asked = performance.now();
        const holds = await this.#tryHold();
        clearTimeout(this.#expiry);
        this.#set(holds);
        // Counted from before the request: what others count from cannot be earlier. Not left to the next try to notice,
        // which may hang.
        if (holds) {
          const left = this.#times.deadlineMs - (performance.now() - asked);
          this.#expiry = setTimeout(() => this.#set(false), Math.max(0, left));
        }
      } catch (error) {
        this.#options.log.warn({ event: 'lease_failed', err: error }, 'cannot renew or look at the lease');
      }
      await sleep(this.#times.retryMs * (0.8 + 0.4 * Math.random()), undefined, { signal: this.#stop.signal }).catch(
        () => {},
      );
    }
    const led = this.#leading;
    clearTimeout(this.#expiry);
    this.#set(false);
    if (led) await this.#release().catch(() => {});
  }

  #set(leading: boolean): void {
    if (leading === this.#leading) return;
    this.#leading = leading;
    const { log, identity, changed } = this.#options;
    log.info(
      { event: leading ? 'leading' : 'not_leading', identity },
      leading ? 'this replica writes' : 'this replica only serves',
    );
    changed(leading);
  }

  /** @returns whether the Lease is ours now */
  async #tryHold(): Promise<boolean> {
    const { api, name, identity } = this.#options;
    const timeoutMs = this.#times.deadlineMs / 2;
    const now = new Date();
    const spec = {
      holderIdentity: identity,
      leaseDurationSeconds: Math.ceil(this.#times.durationMs / 1000),
      renewTime: microTime(now),
    };
    let lease: Lease;
    try {
      lease = await api.request<Lease>('GET', `${this.#path}/${name}`, { timeoutMs });
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
      const body = { metadata: { name }, spec: { ...spec, acquireTime: microTime(now), leaseTransitions: 0 } };
      return this.#write('POST', this.#path, body, timeoutMs);
    }
    const holder = lease.spec?.holderIdentity ?? '';
    const version = lease.metadata.resourceVersion ?? '';
    if (this.#seen?.version !== version) this.#seen = { version, at: performance.now() };
    const free = holder === '' || performance.now() - this.#seen.at > (lease.spec?.leaseDurationSeconds ?? 0) * 1000;
    if (holder !== identity && !free) return false;
    const own =
      holder === identity
        ? { ...lease.spec, ...spec }
        : { ...spec, acquireTime: microTime(now), leaseTransitions: (lease.spec?.leaseTransitions ?? 0) + 1 };
    return this.#write('PUT', `${this.#path}/${name}`, { ...lease, spec: own }, timeoutMs);
  }

  async #write(method: 'POST' | 'PUT', path: string, body: object, timeoutMs: number): Promise<boolean> {
    try {
      await this.#options.api.request(method, path, { body, timeoutMs });
      return true;
    } catch (error) {
      // Another replica was first.
      if (error instanceof ApiError && error.status === 409) return false;
      throw error;
    }
  }

  async #release(): Promise<void> {
    const { api, name, identity } = this.#options;
    const lease = await api.request<Lease>('GET', `${this.#path}/${name}`, { timeoutMs: 2000 });
    if (lease.spec?.holderIdentity !== identity) return;
    const spec = { ...lease.spec, holderIdentity: '', leaseDurationSeconds: 1 };
    await api.request('PUT', `${this.#path}/${name}`, { body: { ...lease, spec }, timeoutMs: 2000 });
  }
}

/** Kubernetes' MicroTime: six digits of a second. */
const microTime = (date: Date): string => date.toISOString().replace('Z', '000Z');
