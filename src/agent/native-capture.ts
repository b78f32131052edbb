/** Capture done by the kernel: the interface of capture.ts on top of the addon. */

import type {
  AdoptedPod,
  BeforeCapture,
  Capture,
  CaptureOptions,
  CaptureOrigin,
  CapturePod,
  CaptureStatus,
  HeldPod,
  HeldTotals,
  PodVerdict,
  Repair,
} from './capture.js';
import { type AddonCapture, calling, captureAddon } from './capture-addon.js';

/**
 * Loads the BPF programs, attaches them to the cgroup and adopts what is pinned. Takes some 100 ms.
 * Throws CaptureError when the kernel refuses or another agent uses the pin directory.
 */
export function openCapture(options: CaptureOptions): Capture {
  return new NativeCapture(options);
}

/**
 * Takes everything of an agent out of the kernel without that agent: links are detached, pins and directories removed.
 * @returns number of pins that were there
 */
export function removePins(pinDirectory: string): number {
  return calling(() => captureAddon().removePins(pinDirectory));
}

/** As {@link Capture.removeStrays}, where no agent is: in the network namespace of this process. */
export function removeStrayGuards(): number {
  return calling(() => captureAddon().removeStrayGuards());
}

class NativeCapture implements Capture {
  readonly #addon: AddonCapture;

  constructor(options: CaptureOptions) {
    this.#addon = calling(() => new (captureAddon().Capture)(options));
  }

  trustProxy(pid: number): void {
    calling(() => this.#addon.trustProxy(pid));
  }

  distrustProxy(pid: number): void {
    calling(() => this.#addon.distrustProxy(pid));
  }

  trustProber(pid: number): void {
    calling(() => this.#addon.trustProber(pid));
  }

  distrustProber(pid: number): void {
    calling(() => this.#addon.distrustProber(pid));
  }

  decide(uid: string, verdict: PodVerdict): void {
    calling(() => this.#addon.decide(uid, verdict));
  }

  forget(uid: string): void {
    calling(() => this.#addon.forget(uid));
  }

  decided(): string[] {
    return calling(() => this.#addon.decided());
  }

  held(): HeldPod[] {
    const now = Date.now();
    return calling(() => this.#addon.held()).map(({ ageMs, ...pod }) => ({ ...pod, since: new Date(now - ageMs) }));
  }

  heldTotals(): HeldTotals {
    return calling(() => this.#addon.heldTotals());
  }

  prepare(pod: CapturePod): void {
    calling(() => this.#addon.prepare(pod));
  }

  activate(pod: CapturePod): BeforeCapture | undefined {
    return calling(() => this.#addon.activate(pod));
  }

  drain(uid: string): void {
    calling(() => this.#addon.drain(uid));
  }

  release(uid: string): void {
    calling(() => this.#addon.release(uid));
  }

  adopted(): AdoptedPod[] {
    return calling(() => this.#addon.adopted());
  }

  origin(): CaptureOrigin {
    return calling(() => this.#addon.origin());
  }

  repair(): Repair {
    return calling(() => this.#addon.repair());
  }

  removeStrays(): number {
    return calling(() => this.#addon.removeStrays());
  }

  status(): CaptureStatus[] {
    return calling(() => this.#addon.status());
  }

  close(options: { readonly remove: boolean }): void {
    calling(() => this.#addon.close(options.remove));
  }
}
