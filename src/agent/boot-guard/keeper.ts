/** The agent's part in the boot guard: tells what became of it at this boot, keeps it installed, takes it away at the end. */
import type { Logger } from '../../mesh/log.js';
import type { CaptureOrigin } from '../capture.js';
import { install, remove, UnsuitableNode } from './install.js';
import { readBootReport, removeBootReport } from './report.js';
import type { BootGuardOptions } from './units.js';

export interface KeeperOptions {
  /** Where to install, and what; undefined: nothing is installed, what is there is told of all the same. */
  readonly place: { readonly root: string; readonly options: BootGuardOptions } | undefined;
  /** Directory in which the guard reports, as this process sees it. */
  readonly runDirectory: string;
  readonly log: Logger;
}

export class BootGuardKeeper {
  readonly #options: KeeperOptions;
  #installed = false;
  #guarded: boolean | undefined;

  constructor(options: KeeperOptions) {
    this.#options = options;
  }

  /** Whether new pods of this boot were guarded before an agent came; undefined where no guard is installed or it is not known. */
  get guarded(): boolean | undefined {
    return this.#guarded;
  }

  /** Whether the guard is installed for the next boot; undefined where it need not be. */
  get installed(): boolean | undefined {
    return this.#options.place === undefined ? undefined : this.#installed;
  }

  /** This agent has the node. @param origin whose pins it found */
  begin(origin: CaptureOrigin): void {
    const { log, place, runDirectory } = this.#options;
    const report = readBootReport(runDirectory);
    if (origin === 'boot guard') {
      this.#guarded = true;
      log.info(
        { event: 'boot_guard_adopted', ...(report === undefined ? {} : { uptimeSeconds: report.uptimeSeconds }) },
        'the boot guard held new pods since this boot; this agent decides about them now',
      );
    } else if (origin === 'nothing' && report?.state === 'guarded') {
      this.#guarded = false;
      log.error(
        { event: 'boot_guard_lost', uptimeSeconds: report.uptimeSeconds },
        'the boot guard was there at this boot, and somebody has taken it out of the kernel: pods spoke in clear since',
      );
    } else if (report?.state === 'guarded' || report?.state === 'agent') {
      this.#guarded = true;
    } else if (report !== undefined) {
      this.#guarded = false;
      log.warn(
        { event: 'boot_not_guarded', state: report.state, reason: report.message },
        'the boot guard did not hold new pods at this boot: those that started before the agent spoke in clear',
      );
    }
    if (place === undefined) {
      if (report === undefined) return;
      log.warn(
        { event: 'boot_guard_not_wanted' },
        'a boot guard is installed on this node, and this agent does not keep it',
      );
      return;
    }
    try {
      const written = install(place.root, place.options);
      this.#installed = true;
      log.info({ event: 'boot_guard_installed', written }, 'the boot guard is installed');
    } catch (error) {
      const unsuitable = error instanceof UnsuitableNode;
      log.warn(
        { event: 'boot_guard_not_installed', unsuitable, reason: (error as Error).message },
        'pods that start before the agent after a boot of this node will speak in clear',
      );
    }
  }

  /** All pods are let go, so nothing is to be guarded any more. */
  end(): void {
    const { log, place, runDirectory } = this.#options;
    // An agent that comes later in this boot finds nothing in the kernel because of this one.
    removeBootReport(runDirectory);
    if (place === undefined) return;
    try {
      const removed = remove(place.root, place.options.execDirectory);
      log.info({ event: 'boot_guard_removed', removed }, 'the boot guard is taken away');
    } catch (error) {
      log.error(
        { event: 'boot_guard_not_removed', err: error },
        'the boot guard stays on this node; it frees the node by itself some time after the next boot',
      );
    }
  }
}
