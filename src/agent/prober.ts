/** Keeps the capture told which process is the kubelet, whose probes reach pods past the proxy. */
import type { Logger } from '../mesh/log.js';
import type { Capture } from './capture.js';
import { findKubelet, isRunning, type Kubelet, type KubeletSearch } from './kubelet.js';

/** How often it is looked whether the kubelet is still the one it was. */
const CHECK_MS = 2000;

export class Prober {
  readonly #capture: Pick<Capture, 'trustProber' | 'distrustProber'>;
  readonly #search: KubeletSearch;
  readonly #log: Logger;
  readonly #timer: NodeJS.Timeout;
  #kubelet: Kubelet | undefined;
  #said = '';

  /** @param found the kubelet, where it was found already */
  constructor(
    capture: Pick<Capture, 'trustProber' | 'distrustProber'>,
    search: KubeletSearch,
    log: Logger,
    found: Kubelet | undefined,
  ) {
    this.#capture = capture;
    this.#search = search;
    this.#log = log;
    if (found !== undefined) this.#trust(found);
    this.#timer = setInterval(() => this.#check(), CHECK_MS);
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  #check(): void {
    if (this.#kubelet !== undefined && isRunning(this.#search, this.#kubelet)) return;
    if (this.#kubelet !== undefined) {
      const { pid } = this.#kubelet;
      this.#kubelet = undefined;
      this.#log.info({ event: 'kubelet_ended', pid }, 'the kubelet has ended; looking for the next one');
      this.#try(() => this.#capture.distrustProber(pid));
    }
    const found = findKubelet(this.#search);
    if (found !== undefined) this.#trust(found);
    else this.#say(`no process of root listens on the kubelet's port ${this.#search.port}`);
  }

  #trust(kubelet: Kubelet): void {
    const { pid } = kubelet;
    if (!this.#try(() => this.#capture.trustProber(pid))) return;
    this.#kubelet = kubelet;
    this.#said = '';
    this.#log.info({ event: 'kubelet_found', pid }, 'its probes reach captured pods past the proxy');
  }

  #try(call: () => void): boolean {
    try {
      call();
      return true;
    } catch (error) {
      this.#say((error as Error).message);
      return false;
    }
  }

  #say(reason: string): void {
    if (reason === this.#said) return;
    this.#said = reason;
    this.#log.warn({ event: 'kubelet_not_found', reason }, 'probes of the kubelet go through the proxy meanwhile');
  }
}
