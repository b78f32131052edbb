/** The processes of this node's pods, found in the host's /proc by the cgroups that the kubelet put them into. */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { processIds } from './proc.js';

/** A process of a pod, outside of the node's own network namespace. */
export interface PodProcess {
  readonly pid: number;
  /** Field 22 of /proc/PID/stat: clock ticks after boot. */
  readonly startTicks: bigint;
  /** Inode of its network namespace. */
  readonly netns: bigint;
}

export interface PodProcessesOptions {
  /** The host's /proc, seen from a process in its pid namespace. */
  readonly proc: string;
  /** A scan is good for so many milliseconds: pods that come in a burst share one. */
  readonly maxAgeMs?: number;
  /** Milliseconds of a monotonic clock. */
  readonly now?: () => number;
}

const MAX_AGE_MS = 50;
/** Scans take no more than one part of so many of the time. */
const COST_RATIO = 5;

/**
 * The kubelet's cgroup of a pod: `pod` and the UID, by cgroupfs as it is (`/kubepods/burstable/pod1b2c.../ID`), by systemd with
 * underscores in a slice (`kubepods-burstable-pod1b2c_....slice`). A static pod's is 32 digits without dashes. The first match of
 * a path counts: what follows it is below the pod's own cgroup, where a pod may be allowed to name directories.
 */
const POD_CGROUP = /(?:^|[^0-9a-z])pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-z])/i;

/**
 * UID of the pod that a process belongs to.
 * @param cgroup text of /proc/PID/cgroup, of cgroup v1, v2 or both
 * @returns undefined where it is no pod's, or where its hierarchies name different ones
 */
export function podUidOf(cgroup: string): string | undefined {
  let found: string | undefined;
  for (const line of cgroup.split('\n')) {
    // "HIERARCHY:CONTROLLERS:PATH"
    const path = line.slice(line.indexOf(':', line.indexOf(':') + 1) + 1);
    const uid = POD_CGROUP.exec(path)?.[1]?.replaceAll('_', '-').toLowerCase();
    if (uid === undefined) continue;
    if (found !== undefined && found !== uid) return undefined;
    found = uid;
  }
  return found;
}

/** Field 22 of /proc/PID/stat. The name in field 2 may hold spaces and parentheses. */
export function startTicksOf(stat: string): bigint {
  const field = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  if (field === undefined || !/^\d+$/.test(field)) throw new Error('no start time in /proc/PID/stat');
  return BigInt(field);
}

interface Scan {
  readonly atMs: number;
  readonly tookMs: number;
  readonly byUid: ReadonlyMap<string, readonly PodProcess[]>;
  readonly byNetns: ReadonlyMap<bigint, ReadonlySet<string>>;
}

export class PodProcesses {
  readonly #proc: string;
  readonly #maxAgeMs: number;
  readonly #now: () => number;
  #scan: Scan | undefined;

  constructor({ proc, maxAgeMs, now }: PodProcessesOptions) {
    this.#proc = proc;
    this.#maxAgeMs = maxAgeMs ?? MAX_AGE_MS;
    this.#now = now ?? (() => performance.now());
  }

  /** Processes of a pod, one for each network namespace, the oldest first. */
  of(uid: string): readonly PodProcess[] {
    return this.#fresh().byUid.get(uid) ?? [];
  }

  /** UIDs of the pods that have a process in the network namespace with this inode. */
  podsIn(netns: bigint): ReadonlySet<string> {
    return this.#fresh().byNetns.get(netns) ?? new Set();
  }

  /** Path of a process's network namespace. */
  netnsPath(pid: number): string {
    return join(this.#proc, String(pid), 'ns/net');
  }

  #fresh(): Scan {
    const now = this.#now();
    // Where it takes long, as with thousands of processes, it is done more seldom: the event loop has other work, too.
    const maxAgeMs = Math.max(this.#maxAgeMs, COST_RATIO * (this.#scan?.tookMs ?? 0));
    if (this.#scan === undefined || now - this.#scan.atMs > maxAgeMs) {
      const scan = this.#read(now);
      this.#scan = { ...scan, tookMs: this.#now() - now };
    }
    return this.#scan;
  }

  #read(atMs: number): Omit<Scan, 'tookMs'> {
    const oldest = new Map<string, Map<bigint, PodProcess>>();
    const byNetns = new Map<bigint, Set<string>>();
    const host = this.#netnsOf(1);
    for (const pid of processIds(this.#proc)) {
      const found = this.#look(pid);
      if (found === undefined || found.process.netns === host) continue;
      const { uid, process } = found;
      const ofPod = oldest.get(uid) ?? new Map<bigint, PodProcess>();
      oldest.set(uid, ofPod);
      const before = ofPod.get(process.netns);
      if (before === undefined || process.startTicks < before.startTicks) ofPod.set(process.netns, process);
      byNetns.set(process.netns, (byNetns.get(process.netns) ?? new Set()).add(uid));
    }
    const byUid = new Map<string, PodProcess[]>();
    for (const [uid, processes] of oldest) {
      byUid.set(
        uid,
        [...processes.values()].sort((a, b) => Number(a.startTicks - b.startTicks) || a.pid - b.pid),
      );
    }
    return { atMs, byUid, byNetns };
  }

  /** The process, where it is a pod's. */
  #look(pid: number): { readonly uid: string; readonly process: PodProcess } | undefined {
    try {
      const uid = podUidOf(readFileSync(join(this.#proc, String(pid), 'cgroup'), 'utf8'));
      if (uid === undefined) return undefined;
      const netns = this.#netnsOf(pid);
      if (netns === undefined) return undefined;
      const startTicks = startTicksOf(readFileSync(join(this.#proc, String(pid), 'stat'), 'utf8'));
      return { uid, process: { pid, startTicks, netns } };
    } catch {
      // It has ended, or is not ours to look at.
      return undefined;
    }
  }

  #netnsOf(pid: number): bigint | undefined {
    try {
      return statSync(this.netnsPath(pid), { bigint: true }).ino;
    } catch {
      return undefined;
    }
  }
}
