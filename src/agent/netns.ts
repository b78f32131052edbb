/** Network namespaces by descriptor. The addon enters them on threads of its own, never on Node's. */

import { calling, captureAddon } from './capture-addon.js';

/** Opens a network namespace (a bind mount or /proc/PID/ns/net); the caller closes it. Throws when it is something else. */
export function openNetns(path: string): number {
  return calling(() => captureAddon().openNetns(path));
}

/** Addresses of all its interfaces as text, IPv4 and IPv6, loopback's and link-local ones too. */
export function netnsAddresses(fd: number): string[] {
  return calling(() => captureAddon().netnsAddresses(fd));
}

/** Inode by which /proc/PID/ns/net names it. */
export function netnsInode(fd: number): bigint {
  return calling(() => captureAddon().netnsInode(fd));
}

/** SO_NETNS_COOKIE: never reused while the kernel runs. */
export function netnsCookie(fd: number): bigint {
  return calling(() => captureAddon().netnsCookie(fd));
}

/** Closes a descriptor that `openNetns` returned or that came with a message. */
export function closeFd(fd: number): void {
  calling(() => captureAddon().closeFd(fd));
}
