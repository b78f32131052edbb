/** What the agent needs of the machine: capabilities, the root of cgroup2, a bpffs. Each refusal says what to do. */
import { existsSync, readFileSync, statfsSync } from 'node:fs';
import { dirname, join } from 'node:path';

/** linux/magic.h */
const CGROUP2_SUPER_MAGIC = 0x63677270;
const BPF_FS_MAGIC = 0xcafe4a11;

/** linux/capability.h, what each is for, and whether the agent can do nothing without it. */
export const CAPABILITIES = [
  { name: 'CAP_NET_ADMIN', bit: 12n, use: 'attaching programs', needed: true },
  { name: 'CAP_SYS_PTRACE', bit: 19n, use: 'opening network namespaces by the processes of pods', needed: false },
  { name: 'CAP_SYS_ADMIN', bit: 21n, use: 'entering the network namespaces of pods', needed: true },
  { name: 'CAP_PERFMON', bit: 38n, use: 'seeing new pods at tracepoints', needed: false },
  { name: 'CAP_BPF', bit: 39n, use: 'loading programs', needed: true },
] as const;
const CAP_SYS_ADMIN_BIT = 21n;
/** CAP_SYS_ADMIN is accepted for these by every kernel. */
const BY_SYS_ADMIN: readonly string[] = ['CAP_BPF', 'CAP_PERFMON'];

/** Those of {@link CAPABILITIES} that a process lacks. @param status text of its /proc/PID/status */
export function missingCapabilities(status: string): (typeof CAPABILITIES)[number][] {
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`);
  const has = (bit: bigint): boolean => (effective & (1n << bit)) !== 0n;
  return CAPABILITIES.filter(({ name, bit }) => !has(bit) && !(has(CAP_SYS_ADMIN_BIT) && BY_SYS_ADMIN.includes(name)));
}

/** @throws Error naming the capabilities that this process lacks */
export function checkCapabilities(status = readFileSync('/proc/self/status', 'utf8')): void {
  const missing = missingCapabilities(status).filter(({ needed }) => needed);
  if (missing.length === 0) return;
  const list = missing.map(({ name, use }) => `${name} (${use})`).join(', ');
  throw new Error(`this process lacks ${list}; run it as root, or add the capabilities to its container`);
}

/** Undoes the octal escapes of mountinfo (proc(5)). */
const unescapeMount = (text: string): string =>
  text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));

/**
 * Mount point of the root of the cgroup2 hierarchy.
 * @param mountinfo text of /proc/self/mountinfo
 * @throws Error where none is mounted, or only a part of it is
 */
export function findCgroupRoot(
  mountinfo = readFileSync('/proc/self/mountinfo', 'utf8'),
  isRoot: (path: string) => boolean = isCgroupRoot,
): string {
  const mounts: string[] = [];
  for (const line of mountinfo.split('\n')) {
    // "36 35 98:0 ROOT MOUNTPOINT options [optional fields] - TYPE source superoptions"
    const [left = '', right = ''] = line.split(' - ');
    if (right.split(' ')[0] !== 'cgroup2') continue;
    const [, , , root, point] = left.split(' ');
    if (point === undefined) continue;
    mounts.push(unescapeMount(point));
    // A container with a cgroup namespace of its own sees the root above its own: "/../..".
    if (/^(\/|(\/\.\.)+)$/.test(root ?? '') && isRoot(unescapeMount(point))) return unescapeMount(point);
  }
  if (mounts.length === 0) {
    throw new Error('no cgroup2 is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) or see --cgroup');
  }
  throw new Error(
    `${mounts.join(', ')} is not the root of cgroup2 but a part of it, so pods would run outside; ` +
      'start the agent in the cgroup namespace of the machine with its /sys/fs/cgroup, or choose a directory with --cgroup',
  );
}

/** Only the true root has no cgroup.events: a cgroup namespace shows "/" for its own root as well. */
function isCgroupRoot(path: string): boolean {
  return existsSync(join(path, 'cgroup.procs')) && !existsSync(join(path, 'cgroup.events'));
}

/** @throws Error unless the directory is one of cgroup2 */
export function checkCgroup(path: string): void {
  if (magicOf(path, '--cgroup') !== CGROUP2_SUPER_MAGIC) {
    throw new Error(`--cgroup ${path} is no directory of cgroup2; leave it out to take the root of cgroup2`);
  }
}

/**
 * The cgroup below which the kubelet has this node's pods, by the agent's own, which is a pod's. In a cgroup namespace of its
 * own the agent does not see where it is.
 * @param cgroup text of /proc/self/cgroup
 * @returns path in the hierarchy of cgroup2, such as `/kubepods` or `/node1/kubepods.slice`; undefined where it does not show
 */
export function podsCgroup(cgroup = readFileSync('/proc/self/cgroup', 'utf8')): string | undefined {
  const path = /^0::(\/.*)$/m.exec(cgroup)?.[1];
  return /^(?:\/[^/.][^/]*)*?\/(?:[^/]+-)?kubepods(?:\.slice)?(?=\/)/.exec(path ?? '')?.[0];
}

/** Whether the path, or its nearest parent that exists, is on a bpffs. */
export function isOnBpffs(path: string): boolean {
  let there = path;
  while (!existsSync(there) && dirname(there) !== there) there = dirname(there);
  return magicOf(there, '--bpffs') === BPF_FS_MAGIC;
}

function magicOf(path: string, flag: string): number {
  try {
    return statfsSync(path).type;
  } catch (error) {
    throw new Error(`${flag} ${path} cannot be used: ${(error as Error).message}; choose a directory that exists`);
  }
}

/** Differs from boot to boot. */
export const bootId = (): string => readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
