/** The manifests that were in force, kept in the data directory: a controller that starts again must not forget a policy. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from '../mesh/log.js';
import { ensurePrivateDirectory, writeFileAtomic } from './files.js';

const FILE = 'last-good-manifests.json';
/** Changes are gathered this long before they are written. */
const QUIET_MS = 200;

interface Stored {
  readonly version: 1;
  /** Absolute path of the folder of manifests. */
  readonly folder: string;
  readonly texts: Readonly<Record<string, string>>;
}

export class LastGood {
  readonly #path: string;
  readonly #folder: string;
  readonly #log: Logger;
  /** What an earlier run had in force, by path in the folder; undefined where there was none on this folder. */
  readonly texts: ReadonlyMap<string, string> | undefined;
  #written = '';
  #due: (() => ReadonlyMap<string, string>) | undefined;
  #timer: NodeJS.Timeout | undefined;

  /** @param folder absolute path of the folder of manifests: what was good in another one says nothing about this one */
  constructor(directory: string, folder: string, log: Logger) {
    ensurePrivateDirectory(directory);
    this.#path = join(directory, FILE);
    this.#folder = folder;
    this.#log = log;
    this.texts = this.#read();
  }

  /** Writes what is in force, soon. */
  remember(texts: () => ReadonlyMap<string, string>): void {
    this.#due = texts;
    this.#timer ??= setTimeout(() => this.flush(), QUIET_MS);
  }

  /** Writes what is due, now. */
  flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const texts = this.#due?.();
    this.#due = undefined;
    if (texts === undefined) return;
    const stored: Stored = { version: 1, folder: this.#folder, texts: Object.fromEntries(texts) };
    const text = JSON.stringify(stored);
    if (text === this.#written) return;
    try {
      writeFileAtomic(this.#path, text, 0o600);
      this.#written = text;
    } catch (error) {
      this.#log.error(
        { event: 'last_good_failed', file: this.#path, err: error },
        'cannot write what is in force; a restart would not know the last good state of a broken manifest',
      );
    }
  }

  #read(): ReadonlyMap<string, string> | undefined {
    let text: string;
    try {
      text = readFileSync(this.#path, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw new Error(`cannot read ${this.#path}: ${(error as Error).message}; mend it, or remove it`);
    }
    try {
      const stored = JSON.parse(text) as Stored;
      if (stored.version !== 1) throw new Error(`version ${String(stored.version)} is not known`);
      return stored.folder === this.#folder ? new Map(Object.entries(stored.texts)) : undefined;
    } catch (error) {
      this.#log.error(
        { event: 'last_good_unreadable', file: this.#path, err: error },
        'what was in force before cannot be read; it is not used',
      );
      return undefined;
    }
  }
}
