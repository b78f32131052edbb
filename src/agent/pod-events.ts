/** Kubernetes Events on pods that cannot be enrolled, and on those that were after all: what `kubectl describe pod` shows. */
import { randomBytes } from 'node:crypto';
import { type Api, ApiError } from '../mesh/api/index.js';
import type { Logger } from '../mesh/log.js';
import type { PodProgress } from './progress.js';

export const FAILED_REASON = 'EbbtideEnrolmentFailed';
export const ENROLLED_REASON = 'EbbtideEnrolled';

/** What goes by itself within so long is no event, in milliseconds. */
const PATIENCE_MS = 3000;
/** An event is counted up again after this long, then after twice as long, up to the second figure. */
const REPEAT_MS = 15_000;
const REPEAT_MAX_MS = 600_000;
/** Events of a node: so many at once, then one in so many milliseconds. As client-go's filter against spam. */
const BURST = 25;
const REFILL_MS = 5000;
/** etcd's limit of the API for a message. */
const MAX_MESSAGE = 1024;

interface Trouble {
  /** Name of the event on the API, once one was made. */
  event: string | undefined;
  message: string;
  count: number;
  nextMs: number;
  everyMs: number;
  busy: boolean;
}

export class PodEvents {
  readonly #api: Api;
  readonly #node: string;
  readonly #log: Logger;
  readonly #now: () => number;
  readonly #troubles = new Map<string, Trouble>();
  readonly counters = { written: 0, failed: 0, held: 0 };
  #tokens = BURST;
  #refilledMs: number;
  #said = '';

  constructor(api: Api, node: string, log: Logger, now: () => number = () => performance.now()) {
    this.#api = api;
    this.#node = node;
    this.#log = log;
    this.#now = now;
    this.#refilledMs = now();
  }

  /** Takes the state of all pods; to be called when it changes, and every now and then. */
  update(pods: readonly PodProgress[]): void {
    const uids = new Set(pods.map(({ uid }) => uid));
    for (const uid of this.#troubles.keys()) if (!uids.has(uid)) this.#troubles.delete(uid);
    for (const pod of pods) {
      if (pod.badForMs >= PATIENCE_MS && pod.reason !== '') this.#failing(pod);
      else if (pod.good || !pod.wanted) this.#over(pod);
    }
  }

  #failing(pod: PodProgress): void {
    const now = this.#now();
    const trouble = this.#troubles.get(pod.uid) ?? {
      event: undefined,
      message: '',
      count: 0,
      nextMs: 0,
      everyMs: REPEAT_MS,
      busy: false,
    };
    this.#troubles.set(pod.uid, trouble);
    if (trouble.busy || now < trouble.nextMs || !this.#take(now)) return;
    const message = messageOf(pod);
    // Another reason is another event, told at once where the last one was told long enough ago.
    if (message !== trouble.message) Object.assign(trouble, { event: undefined, count: 0, everyMs: REPEAT_MS });
    trouble.message = message;
    trouble.count++;
    trouble.nextMs = now + trouble.everyMs;
    trouble.everyMs = Math.min(trouble.everyMs * 2, REPEAT_MAX_MS);
    trouble.busy = true;
    void this.#write(pod, trouble).finally(() => {
      trouble.busy = false;
    });
  }

  #over(pod: PodProgress): void {
    const trouble = this.#troubles.get(pod.uid);
    if (trouble === undefined || trouble.busy) return;
    this.#troubles.delete(pod.uid);
    // Said only where the trouble was.
    if (pod.good && trouble.count > 0 && this.#take(this.#now())) {
      const text = 'The pod is captured by the mesh now, and its proxy serves it.';
      void this.#post(pod, 'Normal', ENROLLED_REASON, text);
    }
  }

  async #write(pod: PodProgress, trouble: Trouble): Promise<void> {
    if (trouble.event === undefined) {
      trouble.event = await this.#post(pod, 'Warning', FAILED_REASON, trouble.message);
      return;
    }
    const body = { count: trouble.count, lastTimestamp: new Date().toISOString() };
    const path = `/api/v1/namespaces/${pod.namespace}/events/${trouble.event}`;
    try {
      await this.#api.request('PATCH', path, { body, contentType: 'application/merge-patch+json', timeoutMs: 10_000 });
      this.counters.written++;
    } catch (error) {
      // Events live for an hour; the next time it is a new one.
      trouble.event = undefined;
      if (!(error instanceof ApiError && error.status === 404)) this.#failed(error as Error);
    }
  }

  /** @returns the event's name; undefined where it could not be made */
  async #post(pod: PodProgress, type: string, reason: string, message: string): Promise<string | undefined> {
    const { uid, namespace, name } = pod;
    const at = new Date().toISOString();
    const event = `${name.slice(0, 230)}.${randomBytes(8).toString('hex')}`;
    const body = {
      apiVersion: 'v1',
      kind: 'Event',
      metadata: { name: event, namespace },
      involvedObject: { apiVersion: 'v1', kind: 'Pod', namespace, name, uid },
      type,
      reason,
      message: message.slice(0, MAX_MESSAGE),
      source: { component: 'ebbtide-agent', host: this.#node },
      reportingComponent: 'ebbtide-agent',
      reportingInstance: this.#node,
      firstTimestamp: at,
      lastTimestamp: at,
      count: 1,
    };
    try {
      await this.#api.request('POST', `/api/v1/namespaces/${namespace}/events`, { body, timeoutMs: 10_000 });
      this.counters.written++;
      this.#said = '';
      return event;
    } catch (error) {
      this.#failed(error as Error);
      return undefined;
    }
  }

  #failed(error: Error): void {
    this.counters.failed++;
    if (error.message === this.#said) return;
    this.#said = error.message;
    this.#log.warn({ event: 'event_failed', reason: error.message }, 'an Event could not be written');
  }

  #take(now: number): boolean {
    const refill = Math.floor((now - this.#refilledMs) / REFILL_MS);
    if (refill > 0) {
      this.#tokens = Math.min(BURST, this.#tokens + refill);
      this.#refilledMs += refill * REFILL_MS;
    }
    if (this.#tokens <= 0) {
      this.counters.held++;
      return false;
    }
    this.#tokens--;
    return true;
  }
}

function messageOf({ state, reason }: PodProgress): string {
  if (state === 'captured') {
    return `The pod is captured, and its TCP connections are refused until the proxy serves it: ${reason}`;
  }
  return `The pod cannot be taken into the mesh, trying again without end: ${reason}`;
}
