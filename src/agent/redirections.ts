/**
 * Keeps annotation ambient.istio.io/redirection of this node's pods as it should be. By it the controller tells everybody that a
 * pod speaks HBONE, so it is written last. Source: Istio's cni/pkg/util/podutil.go, which patches pods/status likewise.
 */
import { type Api, ApiError } from '../mesh/api/index.js';
import { Backoff } from '../mesh/backoff.js';
import { REDIRECTION_ANNOTATION, REDIRECTION_ENABLED, REDIRECTION_PENDING } from '../mesh/labels.js';
import type { Logger } from '../mesh/log.js';
import { annotatePod } from './pod-annotation.js';
import type { PodProgress } from './progress.js';

/** A pod that is so far along is not called pending unless it takes longer, in milliseconds: one request fewer for most. */
export const PENDING_AFTER_MS = 2000;
/** A value that was written is believed for so long without being seen. */
const BELIEVED_MS = 5000;
/** Requests at once. */
const MAX_IN_FLIGHT = 8;

/**
 * The value that the annotation should have.
 * @returns undefined where it should not be there; `now` where it is to stay as it is
 */
export function wantedRedirection(pod: PodProgress, now: string | undefined): string | undefined {
  const { wanted, state, good, badForMs } = pod;
  // Kubernetes takes the addresses away from a pod that ends; it stays captured to its end.
  if (!wanted && state === 'captured') return now;
  // Its peers must learn to speak plainly before it is let go.
  if (!wanted || state === 'leaving' || state === 'left') return undefined;
  if (good) return REDIRECTION_ENABLED;
  // A proxy that is away for a moment is no reason to tell the whole mesh.
  if (state === 'captured' && now === REDIRECTION_ENABLED) return now;
  return now !== undefined || badForMs >= PENDING_AFTER_MS ? REDIRECTION_PENDING : undefined;
}

interface Entry {
  pod: PodProgress;
  readonly backoff: Backoff;
  /** What was written last: believed until it is seen, or something else is. */
  written:
    | { readonly value: string | undefined; readonly before: string | undefined; readonly atMs: number }
    | undefined;
  busy: boolean;
  notBeforeMs: number;
  said: string;
}

export class Redirections {
  readonly #api: Api;
  readonly #log: Logger;
  readonly #now: () => number;
  readonly #entries = new Map<string, Entry>();
  readonly counters = { written: 0, failed: 0 };
  #inFlight = 0;
  #stopped = false;

  constructor(api: Api, log: Logger, now: () => number = () => performance.now()) {
    this.#api = api;
    this.#log = log;
    this.#now = now;
  }

  /** Takes the state of all pods; to be called when it changes, and every now and then. */
  update(pods: readonly PodProgress[]): void {
    const uids = new Set(pods.map(({ uid }) => uid));
    for (const uid of this.#entries.keys()) if (!uids.has(uid)) this.#entries.delete(uid);
    for (const pod of pods) {
      const entry = this.#entries.get(pod.uid);
      if (entry !== undefined) entry.pod = pod;
      else if (pod.wanted || pod.redirection !== undefined) {
        this.#entries.set(pod.uid, {
          pod,
          backoff: new Backoff({ initialMs: 200, maxMs: 30_000 }),
          written: undefined,
          busy: false,
          notBeforeMs: 0,
          said: '',
        });
      }
    }
    this.#work();
  }

  /** Whether nothing is left to be written. */
  get settled(): boolean {
    return [...this.#entries.values()].every((entry) => !entry.busy && this.#wanted(entry) === this.#current(entry));
  }

  stop(): void {
    this.#stopped = true;
  }

  #current({ pod, written }: Entry): string | undefined {
    const believed =
      written !== undefined && pod.redirection === written.before && this.#now() - written.atMs < BELIEVED_MS;
    return believed ? written.value : pod.redirection;
  }

  #wanted(entry: Entry): string | undefined {
    return wantedRedirection(entry.pod, this.#current(entry));
  }

  #work(): void {
    for (const entry of this.#entries.values()) {
      if (this.#stopped || this.#inFlight >= MAX_IN_FLIGHT) return;
      if (entry.busy || this.#now() < entry.notBeforeMs) continue;
      const wanted = this.#wanted(entry);
      if (wanted !== this.#current(entry)) void this.#write(entry, wanted);
    }
  }

  async #write(entry: Entry, value: string | undefined): Promise<void> {
    const { uid, namespace, name, redirection: before } = entry.pod;
    entry.busy = true;
    this.#inFlight++;
    try {
      await annotatePod(this.#api, { namespace, name, uid }, REDIRECTION_ANNOTATION, value ?? null);
      entry.written = { value, before, atMs: this.#now() };
      this.counters.written++;
      entry.backoff.reset();
      entry.said = '';
      this.#log.info(
        { event: 'redirection_written', uid, namespace, pod: name, value: value ?? null },
        'annotated a pod',
      );
    } catch (error) {
      this.#failed(entry, error as Error);
    } finally {
      entry.busy = false;
      this.#inFlight--;
      this.#work();
    }
  }

  #failed(entry: Entry, error: Error): void {
    const delayMs = entry.backoff.next();
    entry.notBeforeMs = this.#now() + delayMs;
    // The pod is gone, or another one has its name; the list of pods will tell.
    if (error instanceof ApiError && (error.status === 404 || error.status === 409)) return;
    this.counters.failed++;
    if (error.message === entry.said) return;
    entry.said = error.message;
    const { uid, namespace, name } = entry.pod;
    this.#log.warn(
      { event: 'redirection_failed', uid, namespace, pod: name, reason: error.message, retryMs: Math.round(delayMs) },
      'a pod could not be annotated; trying again without end',
    );
  }
}
