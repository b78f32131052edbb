/**
 * The kubelet of this node: the process by whose connections pods are probed, and in whose network namespace the node's own
 * interfaces are. It is known by the port that it listens on, as root and outside of every pod; its name is not, since
 * distributions put it into programs of their own (k3s, MicroK8s).
 */
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { podUidOf, startTicksOf } from './pod-processes.js';
import { listeningInodes, processIds } from './proc.js';

export interface Kubelet {
  readonly pid: number;
  readonly startTicks: bigint;
}

export interface KubeletSearch {
  /** The node's /proc. */
  readonly proc: string;
  /** Port of the kubelet's API. */
  readonly port: number;
  /** Where several nodes share a kernel, the kubelet's command line names the one it is of. */
  readonly nodeName: string;
}

/**
 * Looks through the processes of the node.
 * @returns undefined where none is found, or several and it is not clear which is this node's
 */
export function findKubelet({ proc, port, nodeName }: KubeletSearch): Kubelet | undefined {
  const byNetns = new Map<bigint, number[]>();
  for (const pid of processIds(proc)) {
    if (!isHostRoot(proc, pid)) continue;
    try {
      const { ino } = statSync(join(proc, String(pid), 'ns/net'), { bigint: true });
      byNetns.set(ino, [...(byNetns.get(ino) ?? []), pid]);
    } catch {
      // It has ended, or is not ours to look at.
    }
  }
  const found = [...byNetns.values()].flatMap((pids) => listeners(proc, pids, port));
  const [only] = found;
  const named = found.filter((pid) =>
    argumentsOf(proc, pid).some((each) => each === nodeName || each.endsWith(`=${nodeName}`)),
  );
  const pid = found.length === 1 ? only : named.length === 1 ? named[0] : undefined;
  const startTicks = pid === undefined ? undefined : startOf(proc, pid);
  return pid === undefined || startTicks === undefined ? undefined : { pid, startTicks };
}

/** Whether the process is still the one that was found. */
export function isRunning({ proc }: Pick<KubeletSearch, 'proc'>, { pid, startTicks }: Kubelet): boolean {
  return startOf(proc, pid) === startTicks;
}

function startOf(proc: string, pid: number): bigint | undefined {
  try {
    return startTicksOf(readFileSync(join(proc, String(pid), 'stat'), 'utf8'));
  } catch {
    return undefined;
  }
}

/** Whether a process is root's and of no pod, and no thread of the kernel. */
function isHostRoot(proc: string, pid: number): boolean {
  try {
    const directory = join(proc, String(pid));
    if (!/^Uid:\t0\t/m.test(readFileSync(join(directory, 'status'), 'utf8'))) return false;
    const cgroup = readFileSync(join(directory, 'cgroup'), 'utf8');
    // A process that is in pods of different names by its hierarchies is a pod's, too.
    if (podUidOf(cgroup) !== undefined || /[^0-9a-z]pod[0-9a-f]{8}[-_]/i.test(cgroup)) return false;
    return argumentsOf(proc, pid).length > 0;
  } catch {
    return false;
  }
}

function argumentsOf(proc: string, pid: number): string[] {
  try {
    return readFileSync(join(proc, String(pid), 'cmdline'), 'utf8')
      .split('\0')
      .filter((each) => each !== '');
  } catch {
    return [];
  }
}

/** Processes of one network namespace that hold a socket which listens on the port; the oldest of those that share it. */
function listeners(proc: string, pids: readonly number[], port: number): number[] {
  const sockets = listeningSockets(proc, pids, port);
  if (sockets.size === 0) return [];
  const owners = pids.filter((pid) => {
    try {
      const directory = join(proc, String(pid), 'fd');
      return readdirSync(directory).some((fd) => sockets.has(readlinkSync(join(directory, fd))));
    } catch {
      return false;
    }
  });
  const oldest = owners.sort((a, b) => Number((startOf(proc, a) ?? 0n) - (startOf(proc, b) ?? 0n)))[0];
  return oldest === undefined ? [] : [oldest];
}

/** Links of sockets, as in /proc/PID/fd. */
function listeningSockets(proc: string, pids: readonly number[], port: number): Set<string> {
  const sockets = new Set<string>();
  for (const pid of pids) {
    try {
      for (const table of ['tcp', 'tcp6']) {
        const text = readFileSync(join(proc, String(pid), 'net', table), 'utf8');
        for (const inode of listeningInodes(text, port)) sockets.add(`socket:[${inode}]`);
      }
      return sockets;
    } catch {
      // It has ended; the next one shows the same namespace.
    }
  }
  return sockets;
}
