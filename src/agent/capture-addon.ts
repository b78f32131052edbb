/** The one place where the capture addon is loaded, and what it exports. */

import { createRequire } from 'node:module';
import { type Capture, CaptureError, type CaptureOptions, type HeldPod } from './capture.js';

/** The addon's class; its errors carry `errno` and `log`. */
export interface AddonCapture extends Omit<Capture, 'close' | 'held'> {
  /** The age is since the cgroup was made. */
  held(): (Omit<HeldPod, 'since'> & { readonly ageMs: number })[];
  close(remove: boolean): void;
}

export interface CaptureAddon {
  readonly Capture: new (options: CaptureOptions) => AddonCapture;
  openNetns(path: string): number;
  netnsAddresses(fd: number): string[];
  netnsInode(fd: number): bigint;
  netnsCookie(fd: number): bigint;
  closeFd(fd: number): void;
  removePins(directory: string): number;
  /** In the network namespace of this process. */
  removeStrayGuards(): number;
}

let loaded: CaptureAddon | undefined;

/** Loads the addon on first use. Throws an error that names the file and says how to build it. */
export function captureAddon(): CaptureAddon {
  if (loaded) return loaded;
  const path = new URL('../../native/build/Release/capture.node', import.meta.url).pathname;
  try {
    loaded = createRequire(import.meta.url)(path) as CaptureAddon;
  } catch (error) {
    throw new Error(`loading the capture addon ${path} failed: ${(error as Error).message}; build it: npm run build`, {
      cause: error,
    });
  }
  return loaded;
}

/** Runs a call of the addon; what it throws becomes CaptureError, programming errors stay as they are. */
export function calling<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    if (error instanceof Error && 'errno' in error && 'log' in error) {
      throw new CaptureError(error.message, Number(error.errno), String(error.log));
    }
    throw error;
  }
}
