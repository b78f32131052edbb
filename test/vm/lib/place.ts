/** Where images are kept, and where guests keep what they have while they run. */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import { join } from 'node:path';
import { startTime } from '../../../src/lab/ground.ts';

/** Root of the checkout. */
export const CHECKOUT = new URL('../../../', import.meta.url).pathname.replace(/\/$/, '');
/** Folder of this harness. */
export const HARNESS = join(CHECKOUT, 'test/vm');

/** Outside of the checkout, as of the cluster's programs. Removing it costs a few minutes of the next run. */
export function cacheDirectory(env: NodeJS.ProcessEnv = process.env): string {
  const root = env.EBBTIDE_CACHE || join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'ebbtide');
  const directory = join(root, 'vm');
  mkdirSync(directory, { recursive: true });
  return directory;
}

const PREFIX = 'ebbtide-vm-';
const OWNER = 'owner';

/** Whether what guests had is to stay for somebody to look at. */
export function keepsPlaces(env: NodeJS.ProcessEnv = process.env): boolean {
  return Boolean(env.EBBTIDE_VM_KEEP);
}

/**
 * A directory for one guest, one wire or one image that is being made, which {@link sweepPlaces} removes when this process is
 * gone.
 * @param parent default: where temporary files are
 */
export function makePlace(parent: string = tmpdir()): string {
  const directory = mkdtempSync(join(parent, PREFIX));
  writeFileSync(join(directory, OWNER), `${process.pid} ${startTime(process.pid)}\n`);
  return directory;
}

export function removePlace(directory: string): void {
  rmSync(directory, { recursive: true, force: true });
}

/** Removes the directories of processes that are gone. Their guests went with them. */
export function sweepPlaces(): void {
  for (const parent of [tmpdir(), cacheDirectory()]) {
    for (const name of readdirSync(parent).filter((each) => each.startsWith(PREFIX))) {
      const file = join(parent, name, OWNER);
      if (!existsSync(file)) continue;
      const [pid, started] = readFileSync(file, 'utf8').trim().split(' ');
      if (started !== undefined && startTime(Number(pid)) !== started) removePlace(join(parent, name));
    }
  }
}
