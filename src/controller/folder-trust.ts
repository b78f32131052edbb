/** Root and tokens of a folder: the trust of a mesh without a cluster. */
import { join } from 'node:path';
import type { Logger } from '../mesh/log.js';
import { createAuthority } from './authority.js';
import type { Trust } from './controller.js';
import { NodeCallers } from './node-callers.js';
import { loadRoot } from './root.js';
import { watchRoot } from './root-watch.js';
import { NodeTokens } from './tokens.js';

export interface FolderTrust extends Trust {
  readonly tokens: NodeTokens;
  close(): void;
}

/**
 * Loads, or makes, the root; follows its files once somebody wants to know of changes.
 * @throws Error where the files cannot be used
 */
export async function folderTrust(data: string, ttlSeconds: number, log: Logger): Promise<FolderTrust> {
  const root = await loadRoot(data);
  let authority = createAuthority(root);
  let watching: { close(): void } | undefined;
  const tokens = new NodeTokens(join(data, 'tokens'));
  return {
    tokens,
    authority: () => authority,
    onChange(listener) {
      watching = watchRoot({
        directory: data,
        root,
        log,
        ttlSeconds,
        changed(next) {
          authority = createAuthority(next);
          return listener();
        },
      });
    },
    callers: (places) => new NodeCallers(tokens, places),
    close: () => watching?.close(),
  };
}
