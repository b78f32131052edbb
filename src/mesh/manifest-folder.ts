/** Lists a folder of manifests: which files there are and whether they changed, without reading them. */
import { type BigIntStats, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';

/** A manifest file, by its path relative to the folder. */
export interface ListedFile {
  readonly path: string;
  /** Differs whenever the content may differ. */
  readonly signature: string;
  /** CLOCK_REALTIME milliseconds of the last write. */
  readonly writtenMs: number;
}

export interface Listing {
  readonly files: ReadonlyMap<string, ListedFile>;
  /** Directories by path relative to the folder, `` being the folder; the value names the inode. */
  readonly directories: ReadonlyMap<string, string>;
  /** Directories that are there and cannot be read: what was in them is to be kept. */
  readonly unreadable: ReadonlyMap<string, string>;
}

const SUFFIX = /\.(ya?ml|json)$/;
const MAX_DEPTH = 8;

/** Identity and state of a file. */
export function signatureOf(stats: BigIntStats): string {
  return `${stats.dev}:${stats.ino}:${stats.size}:${stats.mtimeNs}:${stats.ctimeNs}`;
}

/**
 * Lists a folder and its subfolders, leaving out names that begin with a dot. Symbolic links are followed to files and not
 * to directories, which suits mounted ConfigMaps.
 * @throws what the system said when the folder itself cannot be read
 */
export function listFolder(root: string): Listing {
  const files = new Map<string, ListedFile>();
  const directories = new Map<string, string>();
  const unreadable = new Map<string, string>();

  const visit = (relative: string, depth: number): void => {
    const directory = join(root, relative);
    const stats = statSync(directory, { bigint: true });
    const entries = readdirSync(directory, { withFileTypes: true });
    directories.set(relative, `${stats.dev}:${stats.ino}`);
    for (const entry of entries) {
      if (entry.name.startsWith('.')) continue;
      const path = join(relative, entry.name);
      try {
        if (entry.isDirectory() && depth < MAX_DEPTH) visit(path, depth + 1);
        else if (SUFFIX.test(entry.name)) {
          const found = statSync(join(root, path), { bigint: true });
          if (found.isFile()) {
            files.set(path, { path, signature: signatureOf(found), writtenMs: Number(found.mtimeMs) });
          }
        }
      } catch (error) {
        const { code, message } = error as NodeJS.ErrnoException;
        // Gone between listing and looking: not there.
        if (code !== 'ENOENT' && code !== 'ENOTDIR') unreadable.set(path, message);
      }
    }
  };
  visit('', 0);
  return { files, directories, unreadable };
}
