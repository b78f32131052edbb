/** Puts the boot guard on a node and takes it away: an executable and two systemd units below the node's root. */
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import {
  allLinks,
  type BootGuardOptions,
  EXECUTABLE,
  GUARD_UNIT,
  links,
  targetOf,
  UNIT_DIRECTORY,
  units,
  WAIT_UNIT,
} from './units.js';

/** The executable of this installation, to be copied to nodes. */
export const OWN_EXECUTABLE = new URL(`../../../native/build/Release/${EXECUTABLE}`, import.meta.url).pathname;

/** A node on which the guard cannot be: no systemd, or a file system that nobody may write to. */
export class UnsuitableNode extends Error {
  override readonly name = 'UnsuitableNode';
}

/** What is on a node. */
export interface Installed {
  /** Both units, all links and this installation's executable are there. */
  readonly state: 'installed' | 'partly' | 'not installed';
  /** What lacks or differs; empty when installed. */
  readonly lacking: readonly string[];
}

/**
 * Installs or updates. What is the same already is not touched.
 * @param root the host's root file system
 * @returns paths on the host that were written
 * @throws UnsuitableNode; Error where the executable was not built
 */
export function install(root: string, options: BootGuardOptions, executable = OWN_EXECUTABLE): string[] {
  const files: [path: string, content: Buffer, mode: number][] = [
    [join(options.execDirectory, EXECUTABLE), program(executable), 0o755],
    ...Object.entries(units(options)).map(([name, text]): [string, Buffer, number] => [
      join(UNIT_DIRECTORY, name),
      Buffer.from(text),
      0o644,
    ]),
  ];
  if (!existsSync(join(root, UNIT_DIRECTORY))) {
    throw new UnsuitableNode(
      `${join(root, UNIT_DIRECTORY)} is not there: the node is not run by systemd (Talos), or this is not its root file ` +
        'system (--host-root); pods of this node that start before the agent after a boot cannot be guarded',
    );
  }
  const wanted = links(options);
  const written: string[] = [];
  try {
    // Asked beforehand: Node's recursive mkdir tells of a read-only file system as of a directory that is missing.
    for (const path of [UNIT_DIRECTORY, options.execDirectory]) accessSync(nearest(join(root, path)), constants.W_OK);
    // A link that is not wanted any more would still make the kubelet depend on the guard.
    for (const link of allLinks().filter((each) => !wanted.includes(each))) unlink(root, join(UNIT_DIRECTORY, link));
    for (const [path, content, mode] of files) if (replace(join(root, path), content, mode)) written.push(path);
    for (const link of wanted) {
      const path = join(UNIT_DIRECTORY, link);
      if (isThere(join(root, path))) continue;
      mkdirSync(join(root, dirname(path)), { recursive: true });
      symlinkSync(targetOf(link), join(root, path));
      written.push(path);
    }
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code !== 'EROFS' && code !== 'EACCES' && code !== 'EPERM') throw error;
    throw new UnsuitableNode(
      `the node's file system cannot be written to (${message}), as on Bottlerocket; pods of this node that start before ` +
        'the agent after a boot cannot be guarded',
    );
  }
  return written;
}

/** Takes everything away that {@link install} made. @returns paths on the host that were there */
export function remove(root: string, execDirectory: string): string[] {
  const paths = [
    ...allLinks().map((link) => join(UNIT_DIRECTORY, link)),
    join(UNIT_DIRECTORY, GUARD_UNIT),
    join(UNIT_DIRECTORY, WAIT_UNIT),
    join(execDirectory, EXECUTABLE),
  ];
  const removed = paths.filter((path) => unlink(root, path));
  if (removed.length > 0)
    for (const directory of [execDirectory, dirname(execDirectory)]) rmdirIfEmpty(join(root, directory));
  return removed;
}

/** Looks what is there; nothing is changed. */
export function inspect(root: string, options: BootGuardOptions, executable = OWN_EXECUTABLE): Installed {
  const expected: [path: string, content: Buffer][] = [
    [join(options.execDirectory, EXECUTABLE), program(executable)],
    ...Object.entries(units(options)).map(([name, text]): [string, Buffer] => [
      join(UNIT_DIRECTORY, name),
      Buffer.from(text),
    ]),
  ];
  const lacking = [
    ...expected.flatMap(([path, content]) => {
      if (!isThere(join(root, path))) return [`${path} is not there`];
      return readFileSync(join(root, path)).equals(content) ? [] : [`${path} differs`];
    }),
    ...links(options)
      .map((link) => join(UNIT_DIRECTORY, link))
      .filter((path) => !isThere(join(root, path)))
      .map((path) => `${path} is not there`),
  ];
  if (lacking.length === 0) return { state: 'installed', lacking };
  return { state: isInstalled(root, options.execDirectory) ? 'partly' : 'not installed', lacking };
}

/** Whether anything of a guard is on the node. */
export function isInstalled(root: string, execDirectory: string): boolean {
  return [join(UNIT_DIRECTORY, GUARD_UNIT), join(execDirectory, EXECUTABLE)].some((path) => isThere(join(root, path)));
}

function program(executable: string): Buffer {
  try {
    return readFileSync(executable);
  } catch (error) {
    throw new Error(
      `the boot guard's executable cannot be read (${(error as Error).message}); build it: npm run build`,
      {
        cause: error,
      },
    );
  }
}

/** The path, or the nearest directory above it that exists. */
function nearest(path: string): string {
  return existsSync(path) || dirname(path) === path ? path : nearest(dirname(path));
}

/** Links count, whatever they point to. */
function isThere(path: string): boolean {
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}

/** At no moment is the file half written: the node may lose power. @returns whether it was another one */
function replace(path: string, content: Buffer, mode: number): boolean {
  if (isThere(path) && readFileSync(path).equals(content)) return false;
  mkdirSync(dirname(path), { recursive: true });
  const next = `${path}.next`;
  writeFileSync(next, content, { mode, flush: true });
  chmodSync(next, mode);
  renameSync(next, path);
  return true;
}

function unlink(root: string, path: string): boolean {
  if (!isThere(join(root, path))) return false;
  rmSync(join(root, path));
  if (/\.(wants|requires)$/.test(dirname(path))) rmdirIfEmpty(join(root, dirname(path)));
  return true;
}

function rmdirIfEmpty(path: string): void {
  try {
    rmdirSync(path);
  } catch {
    // Others use it.
  }
}
