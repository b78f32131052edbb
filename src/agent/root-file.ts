/**
 * The mesh's root certificates are a file that the kubelet makes of a ConfigMap, for the proxy beside the agent. At the first
 * installation the ConfigMap may come after the pod, and the kubelet looks at a running pod's volumes only every minute or so;
 * but also whenever the pod changes on the API. So the agent changes an annotation of its own pod until the file is there.
 * Source: Kubernetes' tutorial on updating configuration by ConfigMaps ("kubelet sync period"), pod_workers' syncPod.
 */
import { existsSync } from 'node:fs';
import { type Api, ApiError } from '../mesh/api/index.js';
import type { Logger } from '../mesh/log.js';
import type { OwnPod } from './daemonset.js';
import { annotatePod } from './pod-annotation.js';

/** Annotation of the agent's own pod: since when it waits for the file. Taken off when the file is there. */
export const AWAITED_ANNOTATION = 'ebbtide.dev/root-cert-awaited';
/** The pod is changed this long after the start, then after longer and longer pauses, up to the second figure. */
const FIRST_MS = 2000;
const MAX_MS = 30_000;
/** Then the kubelet's own minute does: no API server is to be kept busy by a mesh that has no controller. */
const GIVE_UP_MS = 300_000;

export interface RootFileOptions {
  readonly api: Api;
  readonly pod: OwnPod;
  /** Path of the certificates. */
  readonly path: string;
  readonly log: Logger;
  /** Milliseconds of a monotonic clock. */
  readonly now?: () => number;
}

export class RootFile {
  readonly #options: RootFileOptions;
  readonly #now: () => number;
  #pauseMs = FIRST_MS;
  readonly #begunMs: number;
  #nextMs: number;
  #asked = 0;
  #busy = false;
  #there = false;

  constructor(options: RootFileOptions) {
    this.#options = options;
    this.#now = options.now ?? (() => performance.now());
    this.#begunMs = this.#now();
    this.#nextMs = this.#begunMs + FIRST_MS;
  }

  /** Looks whether the file is there, and has the kubelet look where it is not; to be called every now and then. */
  look(): void {
    if (this.#there || this.#busy) return;
    if (existsSync(this.#options.path)) {
      this.#there = true;
      if (this.#asked > 0) void this.#annotate(null);
      return;
    }
    if (this.#now() < this.#nextMs || this.#now() - this.#begunMs > GIVE_UP_MS) return;
    this.#nextMs = this.#now() + this.#pauseMs;
    this.#pauseMs = Math.min(this.#pauseMs * 1.5, MAX_MS);
    this.#asked++;
    void this.#annotate(`${new Date().toISOString()} for the ${this.#asked}. time`);
  }

  async #annotate(value: string | null): Promise<void> {
    const { api, log, path, pod } = this.#options;
    this.#busy = true;
    try {
      await annotatePod(api, pod, AWAITED_ANNOTATION, value);
      if (value === null) log.info({ event: 'root_there', path }, 'the root certificates of the mesh are there');
      else if (this.#asked === 1)
        log.info(
          { event: 'root_awaited', path },
          'the root certificates of the mesh are not there yet; waiting for the controller',
        );
    } catch (error) {
      // Without the right or the API it takes the kubelet's minute. A pod that is gone needs nothing.
      if (error instanceof ApiError && error.status === 404) return;
      log.warn(
        { event: 'root_not_asked_for', reason: (error as Error).message },
        'the kubelet could not be made to look for the root certificates',
      );
    } finally {
      this.#busy = false;
    }
  }
}
