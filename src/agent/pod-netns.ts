/** Finds the network namespace of a pod and makes sure that it is the pod's. */
import { closeFd, netnsAddresses, netnsCookie, netnsInode, openNetns } from './netns.js';

/** An open and verified network namespace. */
export interface PodNetns {
  readonly fd: number;
  readonly inode: bigint;
  /** SO_NETNS_COOKIE: never used again while the kernel runs, unlike the inode. */
  readonly cookie: bigint;
}

/** What enrolment needs of network namespaces; a test may give its own. */
export interface NetnsFinder {
  /** @throws Error that says why the path does not lead to the pod's network namespace (yet) */
  open(path: string, addresses: readonly string[]): PodNetns;
  close(netns: PodNetns): void;
}

/** Text of an address in one spelling, so that two can be compared. */
function canonical(address: string): string {
  const bracketed = address.includes(':') ? `[${address}]` : address;
  const host = URL.parse(`http://${bracketed}/`)?.hostname ?? address;
  return host.replace(/^\[|\]$/g, '');
}

/** SO_NETNS_COOKIE of the network namespace that a process is in, by its first thread. Throws when it has ended. */
export function processNetns(pid: number | 'self'): bigint {
  const fd = openNetns(`/proc/${pid}/ns/net`);
  try {
    return netnsCookie(fd);
  } finally {
    closeFd(fd);
  }
}

/** Network namespaces of this kernel. */
export function kernelNetns(): NetnsFinder {
  const own = processNetns('self');
  return {
    open(path, addresses) {
      const fd = openNetns(path);
      try {
        const cookie = netnsCookie(fd);
        if (cookie === own) throw new Error(`${path} is the network namespace of the node itself, not of a pod`);
        const held = netnsAddresses(fd);
        const wanted = new Set(addresses.map(canonical));
        if (!held.some((address) => wanted.has(canonical(address)))) {
          throw new Error(`${path} has none of the pod's addresses ${addresses.join(', ')}; it has ${held.join(', ')}`);
        }
        return { fd, inode: netnsInode(fd), cookie };
      } catch (error) {
        closeFd(fd);
        throw error;
      }
    },
    close({ fd }) {
      closeFd(fd);
    },
  };
}
