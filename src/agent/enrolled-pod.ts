/** One pod on its way into the mesh, in it, and out of it again. */
import { Backoff } from '../mesh/backoff.js';
import type { Logger } from '../mesh/log.js';
import { type Capture, CaptureError, type CapturePod } from './capture.js';
import type { NetnsFinder, PodNetns } from './pod-netns.js';
import { ConnectionLost, ProxyRefusal, type ZdsWorkload } from './zds-connection.js';
import { NoProxy } from './zds-server.js';

/**
 * `waiting`: wanted, but its network namespace is not found or the kernel refused; tried again without end.
 * `preparing`: known to the kernel, the proxy is asked to open its listeners.
 * `captured`: every new connection goes through the proxy, or nowhere.
 * `leaving`: not wanted any more; let go in a moment, or just now, while its last connections through the proxy end.
 * `left`: nothing of it is left here.
 */
export type PodState = 'waiting' | 'preparing' | 'captured' | 'leaving' | 'left';

/** What is wanted of a pod. */
export interface WantedPod {
  readonly uid: string;
  readonly namespace: string;
  readonly name: string;
  readonly serviceAccount: string;
  /** Path of the network namespace; undefined where the pod does not name one, so that it is looked for. */
  readonly netnsPath: string | undefined;
  /** UID by which the kubelet names the pod's cgroup: its own, but for static pods. */
  readonly cgroupUid: string;
  readonly addresses: readonly string[];
  readonly bypassInbound: boolean;
}

/** The proxies, as one pod sees them. */
export interface PodProxies {
  add(workload: ZdsWorkload): Promise<void>;
  del(uid: string): Promise<void>;
}

export interface EnrolledPodOptions {
  readonly capture: Capture;
  readonly proxies: PodProxies;
  readonly netns: NetnsFinder;
  readonly log: Logger;
  /** Captured by an agent before this one. */
  readonly adopted: boolean;
  readonly random?: () => number;
  /** Called after each try to enrol it that failed. */
  failed?(): void;
  /** Called when state or reason is another one. */
  changed?(): void;
  /** Called once nothing is left of the pod here. */
  left(pod: EnrolledPod): void;
}

/** How long connections through the proxy may go on after a pod was let go, so that a request under way is finished. */
const LAST_CONNECTIONS_MS = 2000;
const RETRY_INITIAL_MS = 100;
const RETRY_MAX_MS = 5000;

/**
 * The state machine. Order for a pod that comes: namespace verified, prepare, proxy told, activate. A proxy that is not there
 * or that refuses does not keep a pod from being captured: it fails closed until there is one. Once captured a pod stays so
 * whatever fails, until it is not wanted.
 */
export class EnrolledPod implements ZdsWorkload {
  readonly uid: string;
  readonly #options: EnrolledPodOptions;
  readonly #log: Logger;
  readonly #backoff: Backoff;
  #wanted: WantedPod;
  #state: PodState = 'waiting';
  #reason = '';
  #netns: PodNetns | undefined;
  /** Known to the kernel, so the proxy is to be told of it. */
  #prepared = false;
  /** Captured by this agent or one before. */
  #captured: boolean;
  /** Grows when the steps under way are out of date. */
  #round = 0;
  #timer: NodeJS.Timeout | undefined;
  #tries = 0;

  constructor(wanted: WantedPod, options: EnrolledPodOptions) {
    this.uid = wanted.uid;
    this.#wanted = wanted;
    this.#options = options;
    this.#captured = options.adopted;
    this.#log = options.log.child({ uid: wanted.uid, namespace: wanted.namespace, pod: wanted.name });
    const { random } = options;
    this.#backoff = new Backoff({
      initialMs: RETRY_INITIAL_MS,
      maxMs: RETRY_MAX_MS,
      ...(random === undefined ? {} : { random }),
    });
    if (options.adopted) this.#enter('captured', 'adopted');
  }

  get name(): string {
    return this.#wanted.name;
  }
  get namespace(): string {
    return this.#wanted.namespace;
  }
  get serviceAccount(): string {
    return this.#wanted.serviceAccount;
  }
  get state(): PodState {
    return this.#state;
  }
  /** Why the pod is not further, or what is wrong although it is captured; empty where this side has nothing to say. */
  get reason(): string {
    return this.#reason;
  }
  /** Tries to enrol it that failed in a row. */
  get failedTries(): number {
    return this.#tries;
  }
  /** Whether proxies are to be told of this pod. */
  get isTold(): boolean {
    return this.#prepared || (this.#captured && this.#state !== 'left');
  }

  /** SO_NETNS_COOKIE of its network namespace, once that was found. */
  get netnsCookie(): bigint | undefined {
    return this.#netns?.cookie;
  }

  netnsFd(): number | undefined {
    return this.#prepared ? this.#netns?.fd : undefined;
  }

  /** The pod is wanted, like this; also calls it back while it is leaving. */
  want(wanted: WantedPod): void {
    const same = JSON.stringify(wanted) === JSON.stringify(this.#wanted) && this.#round > 0;
    const leaving = this.#state === 'leaving';
    if (same && !leaving) return;
    this.#wanted = wanted;
    if (leaving) this.#enter(this.#captured ? 'captured' : 'waiting', 'wanted again');
    this.#backoff.reset();
    this.#start();
  }

  /** Looks whether the pod is still in the network namespace that is captured. */
  verify(): void {
    if (this.#state !== 'captured') return;
    try {
      if (this.#netns !== undefined && this.#options.netns.isStill?.(this.#wanted, this.#netns) === true) {
        this.#setReason('');
        return;
      }
      const found = this.#options.netns.open(this.#wanted);
      const same = found.cookie === this.#netns?.cookie;
      this.#options.netns.close(found);
      if (same) {
        this.#setReason('');
        return;
      }
      this.#log.info({ event: 'netns_replaced' }, 'the pod has another network namespace than before');
      this.#start();
    } catch (error) {
      // The pod may be about to end; what is captured stays captured.
      this.#setReason((error as Error).message);
    }
  }

  /** Its programs are detached: where its network namespace lives on, somebody took them off. */
  captureAgain(): void {
    if (this.#state !== 'captured' || this.#netns === undefined) return;
    try {
      if (this.#options.netns.isStill?.(this.#wanted, this.#netns) === false) return;
    } catch {
      return;
    }
    this.#log.error({ event: 'pod_detached' }, "somebody detached the pod's programs; capturing it again");
    this.#start();
  }

  /**
   * Not wanted any more: let go after the delay, so that others learn of it first. The proxies keep what a pod that lives on has
   * open for {@link LAST_CONNECTIONS_MS} more.
   */
  leave(reason: string, delayMs: number): void {
    if (this.#state === 'leaving' || this.#state === 'left') return;
    this.#cancel();
    this.#enter('leaving', reason);
    if (delayMs === 0) this.#letGo();
    else this.#timer = setTimeout(() => this.#drain(), delayMs);
  }

  /** Stops all timers and closes the descriptor; leaves the kernel as it is. */
  stop(): void {
    this.#cancel();
    this.#closeNetns();
  }

  #cancel(): void {
    this.#round++;
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #start(): void {
    this.#cancel();
    void this.#advance(this.#round);
  }

  /** Goes through all steps; each is idempotent, so a pod that is captured goes through them again without a gap. */
  async #advance(round: number): Promise<void> {
    try {
      const pod = this.#prepare();
      const trouble = await this.#tellProxy();
      if (round !== this.#round) return;
      const before = this.#options.capture.activate(pod);
      if (before !== undefined) {
        this.#log.info(
          { event: 'pod_captured', before },
          'captured; what the pod sent and received before was not by the mesh',
        );
      }
      this.#captured = true;
      this.#backoff.reset();
      this.#tries = 0;
      this.#enter('captured', trouble);
      // What the proxies make of it changes by itself; they are asked anew for the status.
      this.#reason = '';
    } catch (error) {
      if (round !== this.#round) return;
      const delay = this.#backoff.next();
      this.#tries++;
      this.#options.failed?.();
      const { message } = error as Error;
      const detail = error instanceof CaptureError && error.log !== '' ? { kernelLog: error.log } : {};
      if (message !== this.#reason) {
        this.#log.warn(
          { event: 'pod_not_enrolled', reason: message, retryMs: Math.round(delay), ...detail },
          'a pod cannot be enrolled yet',
        );
      }
      if (this.#captured) this.#setReason(message);
      else this.#enter('waiting', message);
      this.#timer = setTimeout(() => this.#start(), delay);
    }
  }

  /** Verifies the namespace and makes the pod known to the kernel. */
  #prepare(): CapturePod {
    const { uid, addresses, bypassInbound } = this.#wanted;
    const netns = this.#options.netns.open(this.#wanted);
    const same = this.#netns !== undefined && this.#netns.cookie === netns.cookie;
    if (same) this.#options.netns.close(netns);
    else {
      // Another namespace is another pod to the kernel: what was captured goes with the old one.
      if (this.#netns !== undefined) this.#captured = false;
      this.#closeNetns();
      this.#netns = netns;
    }
    const fd = this.#netns?.fd ?? netns.fd;
    const pod = { uid, netnsFd: fd, addresses, bypassInbound };
    this.#options.capture.prepare(pod);
    this.#prepared = true;
    if (!this.#captured) this.#enter('preparing', '');
    return pod;
  }

  /** @returns what keeps the proxy from serving the pod; empty when it does */
  async #tellProxy(): Promise<string> {
    try {
      await this.#options.proxies.add(this);
      return '';
    } catch (error) {
      if (error instanceof NoProxy) return error.message;
      if (error instanceof ProxyRefusal) return `the proxy cannot serve it: ${error.message}`;
      if (error instanceof ConnectionLost) return error.message;
      throw error;
    }
  }

  /** The pod gets its own network back, and the proxies go on with what they have open for a while. */
  #drain(): void {
    if (!this.#toKernel('drain', () => this.#drain())) return;
    this.#captured = false;
    this.#timer = setTimeout(() => this.#letGo(), LAST_CONNECTIONS_MS);
  }

  /** The pod's connections through the proxies end, and nothing is left of it. */
  #letGo(): void {
    this.#timer = undefined;
    this.#tellGone();
    if (!this.#toKernel('release', () => this.#letGo())) return;
    this.#captured = false;
    this.#prepared = false;
    this.#closeNetns();
    this.#enter('left', this.#reason);
    this.#options.left(this);
  }

  /** @returns whether the kernel did it; if not, it is asked again later */
  #toKernel(step: 'drain' | 'release', again: () => void): boolean {
    try {
      this.#options.capture[step](this.uid);
      return true;
    } catch (error) {
      const delay = this.#backoff.next();
      this.#log.error(
        { event: 'release_failed', err: error, retryMs: Math.round(delay) },
        'a pod cannot be let go yet',
      );
      this.#setReason((error as Error).message);
      this.#timer = setTimeout(again, delay);
      return false;
    }
  }

  #tellGone(): void {
    // Proxies that do not answer are disconnected, and learn from the next snapshot.
    void this.#options.proxies.del(this.uid);
  }

  #closeNetns(): void {
    if (this.#netns !== undefined) this.#options.netns.close(this.#netns);
    this.#netns = undefined;
  }

  #setReason(reason: string): void {
    if (reason === this.#reason) return;
    this.#reason = reason;
    if (reason !== '') this.#log.warn({ event: 'pod_trouble', state: this.#state, reason }, reason);
    this.#options.changed?.();
  }

  #enter(state: PodState, reason: string): void {
    const from = this.#state;
    this.#reason = reason;
    if (from === state && state !== 'captured') return;
    this.#state = state;
    this.#log.info({ event: 'pod_state', from, to: state, ...(reason === '' ? {} : { reason }) }, `pod is ${state}`);
    this.#options.changed?.();
  }
}
