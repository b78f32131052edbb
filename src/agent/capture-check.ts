/** What the capture addon can tell of a machine before anything is captured: features tried, programs that are attached. */
import { calling, captureAddon } from './capture-addon.js';

/** One attempt; see native/capture/kernel_features.h. */
export interface Trial {
  /** KIND:WHAT, such as `program:capture/ebb_connect4` or `netns:sk_lookup`. */
  readonly name: string;
  /** 0 where it worked. */
  readonly errno: number;
  /** What was tried and what came back; "" where it worked. */
  readonly message: string;
  /** libbpf's and the verifier's words. */
  readonly log: string;
}

/** Programs of one hook in one cgroup. */
export interface CgroupPrograms {
  readonly hook: string;
  /** BPF_F_ALLOW_OVERRIDE 1, BPF_F_ALLOW_MULTI 2. */
  readonly attachFlags: number;
  readonly programs: readonly number[];
}

export interface BpfLink {
  readonly id: number;
  readonly program: number;
  readonly kind: 'cgroup' | 'netns' | 'tcx';
  /** Cgroup id, inode of a network namespace, or index of an interface; 0 when that is gone. */
  readonly target: bigint;
  /** enum bpf_attach_type. */
  readonly attachType: number;
}

export interface BpfProgram {
  readonly id: number;
  /** At most 15 characters; "" where it is gone. */
  readonly name: string;
  readonly type: number;
  readonly uid: number;
}

export interface InterfaceProgram {
  readonly interface: string;
  readonly index: number;
  readonly how: 'tcx' | 'tc';
  /** Of a tc filter: lower ones run first. */
  readonly priority: number;
  readonly program: number;
}

export interface PinnedObjects {
  readonly programs: readonly number[];
  readonly links: readonly number[];
}

interface CheckAddon {
  tryFeatures(cgroup: string, bpffs: string): Trial[];
  attachedToCgroup(path: string): CgroupPrograms[];
  bpfLinks(): BpfLink[];
  bpfProgram(id: number): BpfProgram;
  ingressPrograms(netnsFd: number): InterfaceProgram[];
  pinnedObjects(directory: string): PinnedObjects;
  readInNetns(netnsFd: number, path: string): string;
  readonly pinVersion: string;
  readonly targetPort: number;
  readonly targetPorts: number;
}

const addon = (): CheckAddon => captureAddon() as unknown as CheckAddon;

/**
 * Tries all that capture does to the kernel, and undoes it at once.
 * @param cgroup directory of cgroup2 to attach to, "" for none
 * @param bpffs directory on a bpffs to pin in, "" for none
 */
export const tryFeatures = (cgroup: string, bpffs: string): Trial[] =>
  calling(() => addon().tryFeatures(cgroup, bpffs));

/** Programs at capture's hooks of one directory of cgroup2, not of those above. */
export const attachedToCgroup = (path: string): CgroupPrograms[] => calling(() => addon().attachedToCgroup(path));

/** All links to cgroups, network namespaces and interfaces. */
export const bpfLinks = (): BpfLink[] => calling(() => addon().bpfLinks());

export const bpfProgram = (id: number): BpfProgram => calling(() => addon().bpfProgram(id));

/** Programs that see packets which come in at the interfaces of a network namespace, in their order. */
export const ingressPrograms = (netnsFd: number): InterfaceProgram[] => calling(() => addon().ingressPrograms(netnsFd));

/** Ids of what is pinned below a directory; empty where there is none. */
export const pinnedObjects = (directory: string): PinnedObjects => calling(() => addon().pinnedObjects(directory));

/** Name of the directory of this version's pins. */
export const pinVersion = (): string => addon().pinVersion;

/** Text of a file as it is in a network namespace, at most a page of it: settings below /proc/sys/net belong to one. */
export const readInNetns = (netnsFd: number, path: string): string => calling(() => addon().readInNetns(netnsFd, path));

/** Local ports to which captured connections are sent: first and last. */
export const targetPorts = (): readonly [number, number] => {
  const { targetPort, targetPorts: count } = addon();
  return [targetPort, targetPort + count - 1];
};
