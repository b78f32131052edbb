/**
 * Network namespaces that the container runtime made and mounted (`/var/run/netns/cni-...`), looked up by the addresses they
 * hold. They are there before any process is in the pod.
 */
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { closeFd, netnsAddresses, openNetns } from './netns.js';

/** A mounted network namespace. */
export interface MountedNetns {
  readonly path: string;
  readonly inode: bigint;
}

/** What is asked of the kernel; a test gives its own. */
export interface NetnsReader {
  /** Addresses that the namespace at a path holds. Throws when it is none. */
  addresses(path: string): readonly string[];
}

const kernelReader: NetnsReader = {
  addresses(path) {
    const fd = openNetns(path);
    try {
      return netnsAddresses(fd);
    } finally {
      closeFd(fd);
    }
  },
};

/** Loopback and link-local addresses, which every namespace has. */
const COMMON = /^(127\.|169\.254\.|::1$|fe[89ab][0-9a-f]:)/i;
/** A namespace that was looked into is not looked into again sooner, in milliseconds: it takes a thread to enter it. */
const AGAIN_MS = 100;
/** Nor is one whose addresses are known, which seldom change. */
const KNOWN_AGAIN_MS = 2000;

interface Known extends MountedNetns {
  readonly addresses: readonly string[];
  readonly atMs: number;
}

export class CniNamespaces {
  readonly #directory: string;
  readonly #reader: NetnsReader;
  readonly #now: () => number;
  readonly #known = new Map<string, Known>();

  constructor(directory: string, reader: NetnsReader = kernelReader, now: () => number = () => performance.now()) {
    this.#directory = directory;
    this.#reader = reader;
    this.#now = now;
  }

  /** Namespaces that held one of the addresses when they were last looked into; whoever opens one verifies it. */
  holding(addresses: ReadonlySet<string>): MountedNetns[] {
    this.#refresh();
    return [...this.#known.values()].filter((known) => known.addresses.some((address) => addresses.has(address)));
  }

  #refresh(): void {
    const now = this.#now();
    const names = new Set(list(this.#directory));
    for (const name of this.#known.keys()) if (!names.has(name)) this.#known.delete(name);
    for (const name of names) {
      const path = join(this.#directory, name);
      try {
        const { ino: inode } = statSync(path, { bigint: true });
        const known = this.#known.get(name);
        if (known?.inode === inode && now - known.atMs < (known.addresses.length > 0 ? KNOWN_AGAIN_MS : AGAIN_MS)) {
          continue;
        }
        const addresses = this.#reader.addresses(path).filter((address) => !COMMON.test(address));
        this.#known.set(name, { path, inode, addresses, atMs: now });
      } catch {
        // Not mounted yet, or not any more.
        this.#known.delete(name);
      }
    }
  }
}

function list(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    // No runtime of this node mounts namespaces there.
    return [];
  }
}
