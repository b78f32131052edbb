/** What a lab occupies on the machine, all derived from its id, so that a lab whose owner crashed can still be removed. */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { must, run } from './exec.js';
import { waitFor } from './wait.js';

/** State of all labs: one directory each, named by the lab's id. */
export const LABS_DIRECTORY = '/run/ebbtide-lab';
const DISK_DIRECTORY = '/var/lib/ebbtide-lab';
const NETNS_DIRECTORY = '/var/run/netns';

/** Root of the cgroup2 hierarchy, from the mount table. */
export function cgroup2Root(): string {
  for (const line of readFileSync('/proc/mounts', 'utf8').split('\n')) {
    const [, path, type] = line.split(' ');
    if (type === 'cgroup2' && path !== undefined) return path;
  }
  throw new Error('no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup');
}

/** Roots of the cgroup v1 hierarchies, empty on a machine of cgroup2 alone. */
export function cgroup1Roots(): string[] {
  const mounts = readFileSync('/proc/mounts', 'utf8').split('\n');
  return mounts.map((line) => line.split(' ')).flatMap(([, path, type]) => (type === 'cgroup' && path ? [path] : []));
}

/** Where one lab keeps its things. */
export class Ground {
  readonly id: string;
  /** Holds manifests, data, logs, sockets and the bpffs. */
  readonly directory: string;
  readonly cgroup: string;
  readonly bpffs: string;
  /** For what is too large for memory; made by who needs it. */
  readonly disk: string;

  constructor(id: string) {
    this.id = id;
    this.directory = join(LABS_DIRECTORY, id);
    this.disk = join(DISK_DIRECTORY, id);
    this.cgroup = join(cgroup2Root(), `ebbtide-lab-${id}`);
    this.bpffs = join(this.directory, 'bpf');
  }

  /** Claims an unused id for this process and makes the directories, the cgroup and a bpffs of the lab's own. */
  static async claim(): Promise<Ground> {
    mkdirSync(LABS_DIRECTORY, { recursive: true, mode: 0o700 });
    for (let n = 1; ; n++) {
      const ground = new Ground(`${process.pid.toString(36)}${n}`);
      try {
        mkdirSync(ground.directory, { mode: 0o700 });
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'EEXIST') continue;
        throw error;
      }
      writeFileSync(join(ground.directory, 'owner'), `${process.pid} ${startTime(process.pid)}\n`);
      for (const name of ['manifests', 'data', 'logs', 'bpf', 'tmp']) mkdirSync(join(ground.directory, name));
      mkdirSync(ground.cgroup);
      await must(['mount', '-t', 'bpf', 'bpf', ground.bpffs]);
      return ground;
    }
  }

  /** Name of a network namespace of this lab. */
  netnsName(name: string): string {
    return `ebbtide-${this.id}-${name}`;
  }

  netnsPath(name: string): string {
    return join(NETNS_DIRECTORY, this.netnsName(name));
  }

  /** A cgroup below the lab's own, made if missing. */
  subgroup(name: string): string {
    const path = join(this.cgroup, name);
    mkdirSync(path, { recursive: true });
    return path;
  }

  /** Ends every process of the lab and removes all that it occupied. Idempotent; goes on after an error and reports all. */
  async remove(): Promise<void> {
    const failures: string[] = [];
    const attempt = async (step: () => unknown) => {
      try {
        await step();
      } catch (error) {
        failures.push(error instanceof Error ? error.message : String(error));
      }
    };
    if (existsSync(this.cgroup)) {
      await attempt(async () => {
        writeFileSync(join(this.cgroup, 'cgroup.kill'), '1');
        await waitFor(`the processes in ${this.cgroup} to end`, () => !populated(this.cgroup), { timeoutMs: 10_000 });
      });
    }
    // The last name of the pins goes with the mount, and with it links, programs and maps.
    await attempt(async () => {
      const mounted = readFileSync('/proc/mounts', 'utf8').includes(` ${this.bpffs} bpf `);
      if (mounted) await must(['umount', this.bpffs]);
    });
    const prefix = this.netnsName('');
    const namespaces = existsSync(NETNS_DIRECTORY) ? readdirSync(NETNS_DIRECTORY) : [];
    for (const name of namespaces.filter((name) => name.startsWith(prefix))) {
      await attempt(() => must(['ip', 'netns', 'delete', name]));
    }
    // Container runtimes use the hierarchies of cgroup v1 as well, where there are some.
    for (const root of [dirname(this.cgroup), ...cgroup1Roots()]) {
      await attempt(() => removeCgroup(join(root, basename(this.cgroup))));
    }
    await attempt(() => rmSync(this.disk, { recursive: true, force: true }));
    await attempt(() => rmSync(this.directory, { recursive: true, force: true }));
    if (failures.length > 0) throw new Error(`lab ${this.id} was not removed whole:\n  ${failures.join('\n  ')}`);
  }
}

/** Removes the labs whose owner is gone. @returns their ids */
export async function sweep(): Promise<string[]> {
  const swept: string[] = [];
  for (const id of existsSync(LABS_DIRECTORY) ? readdirSync(LABS_DIRECTORY) : []) {
    if (ownerLives(join(LABS_DIRECTORY, id, 'owner'))) continue;
    await new Ground(id).remove();
    swept.push(id);
  }
  return swept;
}

function ownerLives(file: string): boolean {
  if (!existsSync(file)) return false;
  const [pid, started] = readFileSync(file, 'utf8').trim().split(' ');
  return startTime(Number(pid)) === started;
}

/** Start time of a process in clock ticks after boot (proc(5), field 22), which tells a reused pid; '' if it is gone. */
export function startTime(pid: number): string {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '';
  } catch {
    return '';
  }
}

function populated(cgroup: string): boolean {
  return readFileSync(join(cgroup, 'cgroup.events'), 'utf8').includes('populated 1');
}

function removeCgroup(path: string): void {
  if (!existsSync(path)) return;
  for (const entry of readdirSync(path, { withFileTypes: true })) {
    if (entry.isDirectory()) removeCgroup(join(path, entry.name));
  }
  rmdirSync(path);
}

/** Names of programs of the system that are not installed, of those given as {program: Debian package}. */
export async function missingPrograms(programs: Readonly<Record<string, string>>): Promise<string[]> {
  const missing: string[] = [];
  for (const [program, packageName] of Object.entries(programs)) {
    const found = await run(['sh', '-c', `PATH="$PATH:/usr/sbin:/sbin" command -v ${program}`]);
    if (found.code !== 0) missing.push(`${program} (package ${packageName})`);
  }
  return missing;
}
