/** Finds the network namespace of a pod and makes sure that it is the pod's. */
import { statSync } from 'node:fs';
import type { CniNamespaces } from './cni-netns.js';
import { closeFd, netnsAddresses, netnsCookie, netnsInode, openNetns } from './netns.js';
import type { PodProcesses } from './pod-processes.js';

/** An open and verified network namespace. */
export interface PodNetns {
  readonly fd: number;
  readonly inode: bigint;
  /** SO_NETNS_COOKIE: never used again while the kernel runs, unlike the inode. */
  readonly cookie: bigint;
}

/** A pod, as far as its network namespace is looked for. */
export interface PodOfNetns {
  /** UID by which the kubelet names the pod's cgroup. */
  readonly cgroupUid: string;
  /** Where the pod says that it is; undefined: it is looked for. */
  readonly netnsPath: string | undefined;
  readonly addresses: readonly string[];
}

/** What enrolment needs of network namespaces; a test may give its own. */
export interface NetnsFinder {
  /** @throws Error that says why the pod's network namespace is not found (yet) */
  open(pod: PodOfNetns): PodNetns;
  /** Whether a pod is still where it was found, as far as that can be told at little cost; false: open it again. */
  isStill?(pod: PodOfNetns, netns: PodNetns): boolean;
  close(netns: PodNetns): void;
}

/** Where pods that name no path are looked for. */
export interface NetnsSearch {
  readonly processes: PodProcesses;
  readonly mounted: CniNamespaces;
  /** Network namespace of the node, which may not be the agent's own. */
  hostNetnsPath(): string;
}

/** Text of an address in one spelling, so that two can be compared. */
function canonical(address: string): string {
  const bracketed = address.includes(':') ? `[${address}]` : address;
  const host = URL.parse(`http://${bracketed}/`)?.hostname ?? address;
  return host.replace(/^\[|\]$/g, '');
}

/** SO_NETNS_COOKIE of the network namespace at a path. Throws when there is none. */
function cookieAt(path: string): bigint {
  const fd = openNetns(path);
  try {
    return netnsCookie(fd);
  } finally {
    closeFd(fd);
  }
}

/** SO_NETNS_COOKIE of the network namespace that a process is in, by its first thread. Throws when it has ended. */
export function processNetns(pid: number | 'self'): bigint {
  return cookieAt(`/proc/${pid}/ns/net`);
}

/**
 * Network namespaces of this kernel.
 * @param search how pods that name no path are found; without it they are not
 */
export function kernelNetns(search?: NetnsSearch): NetnsFinder {
  const nodes = new Set([processNetns('self')]);
  // Asked when it is needed: it may become known later.
  const isNodes = (cookie: bigint): boolean => {
    if (nodes.size === 1 && search !== undefined) {
      try {
        nodes.add(cookieAt(search.hostNetnsPath()));
      } catch {
        // Process 1 may be out of reach where the agent is no pod; it runs in the network of the node then.
      }
    }
    return nodes.has(cookie);
  };
  /** @param inode that it must have: a process id may have become another process's */
  const verified = (path: string, wanted: ReadonlySet<string>, inode?: bigint): PodNetns => {
    const fd = openNetns(path);
    try {
      const cookie = netnsCookie(fd);
      const found = netnsInode(fd);
      if (inode !== undefined && found !== inode) throw new Error(`${path} is another one than a moment ago`);
      if (isNodes(cookie)) throw new Error(`${path} is the network namespace of the node itself, not of a pod`);
      const held = netnsAddresses(fd);
      if (!held.some((address) => wanted.has(canonical(address)))) {
        throw new Error(`${path} has none of the pod's addresses ${[...wanted].join(', ')}; it has ${held.join(', ')}`);
      }
      return { fd, inode: found, cookie };
    } catch (error) {
      closeFd(fd);
      throw error;
    }
  };
  return {
    open({ cgroupUid, netnsPath, addresses }) {
      const wanted = new Set(addresses.map(canonical));
      if (netnsPath !== undefined) return verified(netnsPath, wanted);
      if (search === undefined) {
        throw new Error('the pod does not name its network namespace; set annotation ebbtide.dev/netns to its path');
      }
      return searched(search, cgroupUid, wanted, verified);
    },
    // While the namespace is held open no other one gets its inode.
    isStill({ cgroupUid, netnsPath }, { inode }) {
      if (netnsPath === undefined) return search?.processes.of(cgroupUid).some(({ netns }) => netns === inode) ?? false;
      return statSync(netnsPath, { bigint: true, throwIfNoEntry: false })?.ino === inode;
    },
    close({ fd }) {
      closeFd(fd);
    },
  };
}

/** By the pod's processes, the oldest first; before there are any, by what the runtime mounted. */
function searched(
  { processes, mounted }: NetnsSearch,
  uid: string,
  wanted: ReadonlySet<string>,
  verified: (path: string, wanted: ReadonlySet<string>, inode: bigint) => PodNetns,
): PodNetns {
  const tried: string[] = [];
  for (const { pid, netns } of processes.of(uid)) {
    try {
      return verified(processes.netnsPath(pid), wanted, netns);
    } catch (error) {
      tried.push((error as Error).message);
    }
  }
  // An address alone proves little: root in a pod may give its pod any. So it counts only where nobody else is in there.
  const candidates = mounted
    .holding(wanted)
    .filter(({ inode }) => [...processes.podsIn(inode)].every((other) => other === uid));
  const [only] = candidates;
  if (only !== undefined && candidates.length === 1) {
    try {
      return verified(only.path, wanted, only.inode);
    } catch (error) {
      tried.push((error as Error).message);
    }
  } else if (candidates.length > 1) {
    const paths = candidates.map(({ path }) => path).join(', ');
    tried.push(`${paths} all have one of its addresses ${[...wanted].join(', ')}`);
  }
  if (tried.length === 0) {
    tried.push(
      'none of its processes runs outside of the network of the node, and no mounted namespace has one of its addresses ' +
        [...wanted].join(', '),
    );
  }
  throw new Error(`the pod's network namespace is not found: ${tried.join('; ')}`);
}
