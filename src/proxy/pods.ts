/** The pods of this node: their listeners in the engine, their identities' certificates, and what could not be started yet. */
import { closeSync, openSync } from 'node:fs';
import { formatIdentity } from '../mesh/identity.js';
import type { Logger } from '../mesh/log.js';
import type { CertificateManager } from './certificates/manager.js';
import type { Engine, LocalPod } from './engine.js';

/** What ZDS says of a pod. */
export type PodInfo = Omit<LocalPod, 'netnsFd'>;

export interface PodsOptions {
  readonly engine: Pick<Engine, 'addPod' | 'removePod'>;
  readonly certificates: Pick<CertificateManager, 'acquire' | 'release'>;
  readonly log: Logger;
  /** The trust domain of a pod, by its workload where that is known. */
  trustDomainOf(pod: PodInfo): string;
  readonly retryMs?: number;
}

interface Pod {
  readonly info: PodInfo;
  /** The identity whose certificate is held for the pod. */
  identity: string;
  /** Where listeners could not be opened: the namespace, and the timer of the next attempt. */
  pending: { readonly netnsFd: number; readonly timer: NodeJS.Timeout; readonly error: string } | undefined;
  /** Whether the engine has listeners of it, of an earlier namespace maybe. */
  running: boolean;
}

export type PodStateName = 'Up' | 'Pending';

const RETRY_MS = 5000;

export class Pods {
  readonly #options: PodsOptions;
  readonly #pods = new Map<string, Pod>();
  readonly counters = { started: 0, stopped: 0 };

  constructor(options: PodsOptions) {
    this.#options = options;
  }

  get active(): number {
    return [...this.#pods.values()].filter(({ running }) => running).length;
  }

  /** Pods whose listeners could not be opened, with the reason. */
  get pending(): { readonly pod: PodInfo; readonly error: string }[] {
    return [...this.#pods.values()].flatMap(({ info, pending }) =>
      pending === undefined ? [] : [{ pod: info, error: pending.error }],
    );
  }

  list(): { readonly info: PodInfo; readonly state: PodStateName; readonly identity: string }[] {
    return [...this.#pods.values()].map(({ info, pending, identity }) => ({
      info,
      state: pending === undefined ? 'Up' : 'Pending',
      identity,
    }));
  }

  uids(): string[] {
    return [...this.#pods.keys()];
  }

  /**
   * Opens the pod's listeners; they are open when this returns. Where they cannot be opened, it is tried again every 5 s.
   * @param netnsFd the pod's network namespace; owned from here on
   * @throws Error for this first attempt
   */
  add(info: PodInfo, netnsFd: number): void {
    const { certificates, log } = this.#options;
    const former = this.#pods.get(info.uid);
    const pod: Pod = { info, identity: this.#identityOf(info), pending: undefined, running: former?.running ?? false };
    if (former !== undefined) this.#settle(former);
    this.#pods.set(info.uid, pod);
    certificates.acquire(pod.identity, info.uid);
    if (former !== undefined && former.identity !== pod.identity) certificates.release(former.identity, info.uid);
    try {
      this.#start(pod, netnsFd);
      closeSync(netnsFd);
    } catch (error) {
      this.#retryLater(pod, netnsFd, (error as Error).message);
      throw error;
    }
    log.info(
      { event: 'pod_started', uid: info.uid, pod: info.name, namespace: info.namespace, identity: pod.identity },
      'opened the listeners of a pod',
    );
  }

  /** Stops a pod; one that is not known is no error. */
  remove(uid: string): void {
    const pod = this.#pods.get(uid);
    if (pod === undefined) return;
    this.#pods.delete(uid);
    this.#settle(pod);
    this.#options.engine.removePod(uid);
    if (pod.running) this.counters.stopped++;
    this.#options.certificates.release(pod.identity, uid);
    const { name, namespace } = pod.info;
    this.#options.log.info({ event: 'pod_stopped', uid, pod: name, namespace }, 'closed the listeners of a pod');
  }

  /** Workloads changed: a pod's trust domain may now be known, or be another one. */
  refreshIdentities(): void {
    for (const pod of this.#pods.values()) {
      const identity = this.#identityOf(pod.info);
      if (identity === pod.identity) continue;
      this.#options.certificates.acquire(identity, pod.info.uid);
      this.#options.certificates.release(pod.identity, pod.info.uid);
      pod.identity = identity;
    }
  }

  /** Gives up what waits for another attempt. What runs goes on. */
  stop(): void {
    for (const pod of this.#pods.values()) this.#settle(pod);
  }

  #identityOf(info: PodInfo): string {
    const serviceAccount = info.serviceAccount || 'default';
    return formatIdentity({
      trustDomain: this.#options.trustDomainOf(info),
      namespace: info.namespace,
      serviceAccount,
    });
  }

  #start(pod: Pod, netnsFd: number): void {
    // The engine closes what it is given in any case; ours stays for another attempt.
    const copy = openSync(`/proc/self/fd/${netnsFd}`, 'r');
    this.#options.engine.addPod({ ...pod.info, netnsFd: copy });
    if (!pod.running) this.counters.started++;
    pod.running = true;
  }

  #retryLater(pod: Pod, netnsFd: number, error: string): void {
    const retryMs = this.#options.retryMs ?? RETRY_MS;
    const { uid, name, namespace } = pod.info;
    this.#options.log.warn(
      { event: 'pod_failed', uid, pod: name, namespace, error, retryInMs: retryMs },
      'could not open the listeners of a pod; trying again',
    );
    const timer = setTimeout(() => {
      try {
        this.#start(pod, netnsFd);
      } catch (again) {
        this.#retryLater(pod, netnsFd, (again as Error).message);
        return;
      }
      pod.pending = undefined;
      closeSync(netnsFd);
      this.#options.log.info({ event: 'pod_started', uid, pod: name, namespace }, 'opened the listeners of a pod');
    }, retryMs);
    pod.pending = { netnsFd, timer, error };
  }

  #settle(pod: Pod): void {
    if (pod.pending === undefined) return;
    clearTimeout(pod.pending.timer);
    closeSync(pod.pending.netnsFd);
    pod.pending = undefined;
  }
}
