/**
 * Sees that what the agent pinned and attached stays so, whoever empties the bpffs or detaches programs. While an agent runs
 * nothing is lost with the pins, because it holds everything itself; while none runs all of it goes, and the next agent is
 * told by a file of this boot that it was there.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from '../mesh/log.js';
import type { Capture } from './capture.js';
import { bootId } from './machine.js';

/** How often it is looked: a few dozen file names and links. */
const LOOK_MS = 2000;
/** Beside the sockets, in a directory that a boot empties. */
const MARK_FILE = 'pinned.json';

export interface PinsWatchOptions {
  readonly capture: Pick<Capture, 'origin' | 'removeStrays' | 'repair'>;
  readonly pinDirectory: string;
  readonly runDirectory: string;
  readonly log: Logger;
  /** The programs of a pod were detached: it is to be captured again. */
  captureAgain(uid: string): void;
  /** Whether all pods are captured that are wanted. */
  settled(): boolean;
  readonly bootId?: string;
}

/** Counted since the start of the process. */
export interface PinsCounters {
  /** Pins that were gone and were made again. */
  restored: number;
  /** Programs that somebody had detached: until then they did nothing. */
  reattached: number;
  /** Times that an agent found everything gone that one before it had pinned: captured pods spoke in clear. */
  lost: number;
}

export class PinsWatch {
  readonly counters: PinsCounters = { restored: 0, reattached: 0, lost: 0 };
  readonly #options: PinsWatchOptions;
  readonly #mark: string;
  readonly #bootId: string;
  #timer: NodeJS.Timeout | undefined;
  #said = '';
  /** Guards of the agent before may be left over. */
  #strays = false;

  constructor(options: PinsWatchOptions) {
    this.#options = options;
    this.#mark = join(options.runDirectory, MARK_FILE);
    this.#bootId = options.bootId ?? bootId();
  }

  start(): void {
    const { capture, log, pinDirectory } = this.#options;
    if (capture.origin() === 'nothing' && this.#marked()) {
      this.counters.lost++;
      this.#strays = true;
      log.error(
        { event: 'pins_lost', pins: pinDirectory },
        'all that an agent before this one had pinned is gone: since then its pods spoke in clear; they are captured again',
      );
    }
    try {
      writeFileSync(this.#mark, `${JSON.stringify({ bootId: this.#bootId, pins: pinDirectory })}\n`, { mode: 0o600 });
    } catch (error) {
      log.warn(
        { event: 'mark_not_written', err: error },
        'if pins are lost while no agent runs, the next one will not know',
      );
    }
    this.#timer = setInterval(() => this.look(), LOOK_MS);
  }

  /** @param kept whether what is pinned stays */
  stop(kept: boolean): void {
    clearInterval(this.#timer);
    if (!kept) rmSync(this.#mark, { force: true });
  }

  /** Looks now. */
  look(): void {
    const { capture, log, captureAgain, settled } = this.#options;
    try {
      const { repinned, reattached, pods } = capture.repair();
      this.#said = '';
      this.counters.restored += repinned;
      this.counters.reattached += reattached;
      if (repinned > 0) {
        log.error(
          { event: 'pins_restored', pins: repinned },
          'pins were gone from the bpffs and are made again; nothing was let go meanwhile',
        );
      }
      if (reattached > 0) {
        log.error({ event: 'programs_reattached', programs: reattached }, "somebody had detached the node's programs");
      }
      for (const uid of pods) captureAgain(uid);
      if (this.#strays && settled()) {
        const guards = capture.removeStrays();
        this.#strays = false;
        if (guards > 0)
          log.info({ event: 'stray_guards_removed', guards }, 'guards of pods that nobody captures any more');
      }
    } catch (error) {
      const { message } = error as Error;
      if (message !== this.#said) log.error({ event: 'pins_not_restored', err: error }, message);
      this.#said = message;
    }
  }

  #marked(): boolean {
    try {
      const mark = JSON.parse(readFileSync(this.#mark, 'utf8')) as { readonly bootId?: string; readonly pins?: string };
      return mark.bootId === this.#bootId && mark.pins === this.#options.pinDirectory;
    } catch {
      return false;
    }
  }
}
