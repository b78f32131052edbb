/**
 * Follows root-key.pem and root-cert.pem while the controller runs, so that an operator changes the root of a mesh without
 * a restart of anything: a second root is added, the key is switched, the first root is taken away.
 */
import { X509Certificate } from 'node:crypto';
import { statSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from '../mesh/log.js';
import { splitPem } from '../mesh/pem.js';
import { CERTIFICATES_FILE, KEY_FILE, type Root, rereadRoot } from './root.js';

/** Two looks of the same state are what tells a finished write from one that goes on. */
const LOOK_MS = 500;

export interface RootWatchOptions {
  /** The data directory. */
  readonly directory: string;
  /** The root that is in force. */
  readonly root: Root;
  readonly log: Logger;
  /** Longest lifetime of a certificate: for so long workloads may not know of a change. */
  readonly ttlSeconds: number;
  /** Takes a root that is in force from now on. */
  changed(root: Root): void | Promise<void>;
}

/** Begins to watch. A pair of files that cannot be used is reported once, and the root in force stays. */
export function watchRoot(options: RootWatchOptions): { close(): void } {
  const { directory, log, ttlSeconds } = options;
  const paths = [KEY_FILE, CERTIFICATES_FILE].map((name) => join(directory, name));
  let inForce = options.root;
  // Empty, so that what was written between the start's reading and now is not missed.
  let taken = '';
  let seen = '';
  let settledAt = 0;
  let closed = false;
  let timer: NodeJS.Timeout;

  const take = async (): Promise<void> => {
    let next: Root;
    try {
      next = await rereadRoot(directory);
    } catch (error) {
      log.error(
        {
          event: 'root_refused',
          reason: (error as Error).message,
          inForce: fingerprint(String(inForce.certificate)),
          hint: 'the root in force stays; mend the files, they are looked at again as soon as they change',
        },
        'the root files cannot be used',
      );
      return;
    }
    // Written meanwhile: what was read may be of two changes, and is read again when they are at rest.
    if (closed || signature(paths) !== taken) return;
    await report(next);
  };

  const report = async (next: Root): Promise<void> => {
    const before = new Set(splitPem(inForce.bundle).map(fingerprint));
    const after = new Set(splitPem(next.bundle).map(fingerprint));
    const added = [...after].filter((root) => !before.has(root));
    const removed = [...before].filter((root) => !after.has(root));
    const signing = fingerprint(String(next.certificate));
    const signingBefore = fingerprint(String(inForce.certificate));
    if (added.length === 0 && removed.length === 0 && signing === signingBefore) return;
    const now = Date.now();
    const early = now < settledAt;
    const abrupt = (signing !== signingBefore && !before.has(signing)) || removed.includes(signingBefore);
    settledAt = now + ttlSeconds * 1000;
    inForce = next;
    await options.changed(next);
    const fields = { event: 'root_changed', signing, added, removed, settledAt: new Date(settledAt).toISOString() };
    log.info(fields, 'took the root files; from `settledAt` on all workloads know of it');
    if (early || abrupt) {
      log.warn(
        {
          event: 'root_change_abrupt',
          signing,
          hint: 'add a root, switch the key to it, remove the old root: each step after the settledAt of the one before',
        },
        'workloads that do not know of this change yet cannot reach those that do, until their certificates are renewed',
      );
    }
  };

  const look = async (): Promise<void> => {
    const now = signature(paths);
    const atRest = now === seen;
    seen = now;
    if (atRest && now !== taken) {
      taken = now;
      await take();
    }
  };
  const next = (): void => {
    if (closed) return;
    timer = setTimeout(() => {
      look()
        .catch((error: unknown) => log.error({ event: 'root_watch_failed', err: error }, 'could not change the root'))
        .finally(next);
    }, LOOK_MS);
    timer.unref();
  };
  next();
  return {
    close() {
      closed = true;
      clearTimeout(timer);
    },
  };
}

/** Differs whenever one of the files may differ. */
function signature(paths: readonly string[]): string {
  return paths
    .map((path) => {
      const stats = statSync(path, { bigint: true, throwIfNoEntry: false });
      return stats === undefined
        ? 'none'
        : `${stats.ino}:${stats.size}:${stats.mode}:${stats.mtimeNs}:${stats.ctimeNs}`;
    })
    .join(' ');
}

const fingerprint = (pem: string): string => new X509Certificate(pem).fingerprint256;
