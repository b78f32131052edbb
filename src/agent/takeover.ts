/**
 * Which of two agents has a node. The kernel's state (maps, links, pins) belongs to whoever holds the lock on the pin directory,
 * and no two can: that lock is part of opening the capture, and the kernel frees it when a process ends in whatever way. An agent
 * that starts asks the one that has the node for it, over the status socket, which only root can open; that one stops
 * touching the kernel, frees the lock, and stands by. It does not end: Kubernetes would start it again, and it would ask for
 * the node again. Standing by it takes the node back when the lock is free, as after a new version that cannot stay up.
 */
import type { Logger } from '../mesh/log.js';
import { type Capture, CaptureError } from './capture.js';
import { askForNode } from './status.js';

export interface TakeoverOptions {
  readonly statusSocket: string;
  readonly log: Logger;
  /** @throws CaptureError with EAGAIN where another agent holds the lock */
  open(): Capture;
  /** The lock is held. Closes the capture itself where it fails. */
  begin(capture: Capture): Promise<void>;
}

const EAGAIN = 11;
/** How often the lock is tried by who was promised it. */
const PROMISED_MS = 50;
/** How often by who stands by, and how long it leaves to the one that asked. */
const STANDING_BY_MS = 500;
const LEAVE_MS = 3000;
/** How often the agent that has the node is asked for it. */
const ASK_MS = 1000;
/** Pause after a failure that may pass. */
const FAILED_MS = 2000;

export class Takeover {
  readonly #options: TakeoverOptions;
  #timer: NodeJS.Timeout | undefined;
  #stopped = false;
  #askedMs = Number.NEGATIVE_INFINITY;
  #said = '';

  constructor(options: TakeoverOptions) {
    this.#options = options;
  }

  /**
   * Takes the node. Where another agent has it: asks for it and resolves, to go on by itself.
   * @param ask whether to ask; otherwise another agent is an error
   * @throws CaptureError, or what `begin` throws
   */
  async start(ask: boolean): Promise<void> {
    const capture = this.#open(ask);
    if (capture !== undefined) await this.#options.begin(capture);
    else this.#again(0, true);
  }

  /** The node was given away: wait for it to be free again. */
  standBy(): void {
    this.#again(LEAVE_MS, false);
  }

  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
  }

  /** @returns undefined where another agent holds the lock */
  #open(mayWait: boolean): Capture | undefined {
    try {
      return this.#options.open();
    } catch (error) {
      if (mayWait && error instanceof CaptureError && error.errno === EAGAIN) return undefined;
      throw error;
    }
  }

  #again(delayMs: number, ask: boolean): void {
    if (this.#stopped) return;
    this.#timer = setTimeout(() => void this.#try(ask), delayMs);
  }

  async #try(ask: boolean): Promise<void> {
    try {
      const capture = this.#open(true);
      if (capture !== undefined) {
        this.#options.log.info({ event: 'node_taken', asked: ask }, 'this agent has the node now');
        await this.#options.begin(capture);
        return;
      }
      if (ask && performance.now() - this.#askedMs >= ASK_MS) {
        this.#askedMs = performance.now();
        await askForNode(this.#options.statusSocket);
      }
      this.#said = '';
    } catch (error) {
      const { message } = error as Error;
      if (message !== this.#said) {
        this.#said = message;
        this.#options.log.warn(
          { event: 'node_not_taken', reason: message },
          'another agent has the node; trying again',
        );
      }
      this.#again(ask ? ASK_MS : FAILED_MS, ask);
      return;
    }
    this.#again(ask ? PROMISED_MS : STANDING_BY_MS, ask);
  }
}
