/**
 * The bpffs and the cgroup2 of the agent, found or mounted. What runs it may have hidden them: `ip netns exec` gives a
 * process a mount namespace of its own, with a fresh /sys in which neither is.
 */
import { execFileSync } from 'node:child_process';
import { openSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { findCgroupRoot, isOnBpffs } from './machine.js';
import { processIds } from './proc.js';

/** Source of the mounts that the agent makes, in mountinfo. */
const MOUNT_SOURCE = 'ebbtide';
/** Each sysfs has this directory for a mount. */
const CGROUP_DIRECTORY = '/sys/fs/cgroup';
/** What the kernel itself puts into each bpffs (CONFIG_BPF_PRELOAD). */
const PRELOADED: readonly string[] = ['maps.debug', 'progs.debug'];
/** Where a machine has its bpffs: left mounted, as an init system would. */
export const DEFAULT_BPFFS = '/sys/fs/bpf';

/** A directory, maybe one that is to be reached by a descriptor of this process only. */
export interface FoundDirectory {
  /** To be used in system calls. */
  readonly path: string;
  /** Whether it was mounted for this call. */
  readonly mounted: boolean;
}

function run(command: string, ...args: string[]): void {
  try {
    execFileSync(command, args, { stdio: ['ignore', 'ignore', 'pipe'], timeout: 10_000 });
  } catch (error) {
    const { stderr, message } = error as Error & { readonly stderr?: Buffer };
    throw new Error(`${command} ${args.join(' ')}: ${stderr?.toString().trim() || message}`, { cause: error });
  }
}

/** A path to the same directory that goes on to work when the process by which it was found has ended. */
function held(path: string): string {
  return `/proc/self/fd/${openSync(path, 'r')}`;
}

/**
 * A process in the machine's mount namespace, where this one is in another: the oldest process that root may look at. Its
 * ancestors may have ended, and process 1 may be out of reach.
 */
export function outerProcess(): number | undefined {
  const own = readlinkSync('/proc/self/ns/mnt');
  const pids = processIds();
  for (const pid of pids.sort((a, b) => a - b)) {
    try {
      // Threads of the kernel have no command line, and the root of a time before the machine's.
      if (readFileSync(`/proc/${pid}/cmdline`).length === 0) continue;
      return readlinkSync(`/proc/${pid}/ns/mnt`) === own ? undefined : pid;
    } catch {
      // Not ours to look at, or gone.
    }
  }
  return undefined;
}

/**
 * The bpffs at a path: as it is seen here, or outside of this process's own mount namespace, or mounted there. It must
 * outlive this process: pods stay captured by what is pinned in it.
 * @throws Error with what was tried
 */
export function provideBpffs(path: string, outer: () => number | undefined = outerProcess): FoundDirectory {
  if (isOnBpffs(path)) return { path, mounted: false };
  const pid = outer();
  const outside = pid === undefined ? path : join(`/proc/${pid}/root`, path);
  if (pid !== undefined && isOnBpffs(outside)) return { path: held(outside), mounted: false };
  try {
    // Node's own recursive mkdir never returns on a file system that refuses with ENOENT, such as /proc.
    run('mkdir', '-p', '-m', '0700', outside);
    const mount = ['mount', '-t', 'bpf', '-o', 'mode=0700', MOUNT_SOURCE, path] as const;
    if (pid === undefined) run(...mount);
    else run('nsenter', `--mount=/proc/${pid}/ns/mnt`, ...mount);
  } catch (error) {
    throw new Error(
      `${path} is no bpffs and none could be mounted there (${(error as Error).message}); ` +
        `mount one: mount -t bpf bpf ${path}, or name another place with --bpffs`,
      { cause: error },
    );
  }
  return { path: pid === undefined ? path : held(outside), mounted: true };
}

/** Takes a bpffs that an agent mounted away again, if it holds nothing; the machine's usual one stays. */
export function releaseBpffs(path: string): boolean {
  if (path === DEFAULT_BPFFS || path.startsWith('/proc/')) return false;
  const ours = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .some((line) => line.split(' ')[4] === path && line.includes(` - bpf ${MOUNT_SOURCE} `));
  if (!ours) return false;
  try {
    // Another agent's pins would go with the mount.
    if (readdirSync(path).some((name) => !PRELOADED.includes(name))) return false;
    run('umount', path);
    return true;
  } catch {
    return false;
  }
}

/**
 * The root of cgroup2: where it is mounted, or else, in a mount namespace of this process's own, by a mount that nobody
 * else sees and that ends with the process.
 * @throws Error where none is mounted on the machine, or only a part of it
 */
export function provideCgroupRoot(outer: () => number | undefined = outerProcess): string {
  const mounts = readFileSync('/proc/self/mountinfo', 'utf8');
  if (!mounts.includes(' - cgroup2 ') && outer() !== undefined) {
    run('mount', '-t', 'cgroup2', MOUNT_SOURCE, CGROUP_DIRECTORY);
  }
  return findCgroupRoot();
}
