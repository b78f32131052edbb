/** Findings about this process and the machine under it: rights, mounts, limits, settings. */
import { existsSync, readFileSync } from 'node:fs';
import { arch, release } from 'node:os';
import { enforcedProfile, profileHint } from '../../agent/apparmor.js';
import type { Trial } from '../../agent/capture-check.js';
import { CAPABILITIES, checkCgroup, findCgroupRoot, isOnBpffs, missingCapabilities } from '../../agent/machine.js';
import { type Finding, failed, notTried, ok, warning } from './finding.js';

const BTF_PATH = '/sys/kernel/btf/vmlinux';
/** Of each captured connection the proxy holds two sockets; nine tenths of the limit are for them (native/engine). */
const PER_CONNECTION = 2;
const PART_FOR_CONNECTIONS = 0.9;
const FEW_DESCRIPTORS = 65_536;
const TOO_FEW_DESCRIPTORS = 1024;

export const kernelFinding = (): Finding => ok('KERNEL_RELEASE', `Linux ${release()}, ${arch()}`);

/** @param status text of /proc/self/status */
export function capabilityFinding(status = readFileSync('/proc/self/status', 'utf8')): Finding {
  const missing = missingCapabilities(status);
  if (missing.length === 0) return ok('CAPABILITIES', CAPABILITIES.map(({ name }) => name).join(', '));
  const list = missing.map(({ name, use }) => `${name} (${use})`).join(', ');
  const hint = 'run it as root, or add the capabilities to the container';
  return missing.some(({ needed }) => needed)
    ? failed('CAPABILITIES', `this process lacks ${list}`, hint)
    : warning('CAPABILITIES', `this process lacks ${list}`, hint);
}

/**
 * Whether a profile of AppArmor may refuse what the agent does. What it does refuse is told where that is tried.
 * @param pinned trial of pinning, where there is a bpffs
 */
export function apparmorFinding(pinned: Trial | undefined, profile = enforcedProfile()): Finding {
  if (profile === undefined) return ok('APPARMOR', 'no profile is enforced on this process');
  const seen = `profile ${profile} is enforced on this process`;
  if (pinned?.errno === 0) return ok('APPARMOR', `${seen}, and lets it pin`);
  const what = pinned === undefined ? seen : `${seen}, which cannot pin: ${pinned.message}`;
  return warning('APPARMOR', what, profileHint(profile));
}

/**
 * Where programs would be attached.
 * @param asked --cgroup
 * @param mounts text of /proc/self/mounts
 */
export function cgroupFinding(
  asked: string | undefined,
  mounts = readFileSync('/proc/self/mounts', 'utf8'),
): { readonly finding: Finding; readonly path: string | undefined } {
  const v1 = mounts.split('\n').some((line) => line.split(' ')[2] === 'cgroup');
  const kind = v1 ? 'a hybrid host: cgroup v1 for resources, cgroup2 beside it' : 'a host of cgroup v2';
  try {
    const path = asked ?? findCgroupRoot();
    checkCgroup(path);
    return { finding: ok('CGROUP_ROOT', `${path}, ${kind}${asked === undefined ? '' : ', as asked'}`), path };
  } catch (error) {
    const hint =
      asked === undefined ? 'mount cgroup2, or name a directory of it with --cgroup' : 'name a directory of cgroup2';
    return { finding: failed('CGROUP_ROOT', (error as Error).message, hint), path: undefined };
  }
}

/** @param trial of pinning there, where it is a bpffs */
export function bpffsFinding(path: string, trial: Trial | undefined): Finding {
  if (!isBpffs(path)) {
    return warning(
      'BPFFS',
      `${path} is no bpffs`,
      'the agent mounts one where it may; with the DaemonSet the host has one at /sys/fs/bpf (mount -t bpf bpf /sys/fs/bpf)',
    );
  }
  if (trial === undefined) return notTried('BPFFS', `${path} is a bpffs; nothing was pinned`);
  if (trial.errno !== 0) return failed('BPFFS', trial.message, `make ${path} writable for this process (see APPARMOR)`);
  return ok('BPFFS', `${path}, pinned and unpinned`);
}

export function isBpffs(path: string): boolean {
  try {
    return existsSync(path) && isOnBpffs(path);
  } catch {
    return false;
  }
}

export function btfFinding(path = BTF_PATH): Finding {
  try {
    return ok('BTF', `${path}, ${Math.round(readFileSync(path).length / 1024)} KiB`);
  } catch (error) {
    return warning(
      'BTF',
      (error as Error).message,
      'new pods cannot be held without it (see HOLD): use a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions have',
    );
  }
}

/** @param limits text of /proc/self/limits */
export function descriptorFinding(limits = readFileSync('/proc/self/limits', 'utf8')): Finding {
  const [, , hard = ''] = /^Max open files\s+(\S+)\s+(\S+)/m.exec(limits) ?? [];
  const limit = hard === 'unlimited' ? Number.POSITIVE_INFINITY : Number(hard);
  if (Number.isNaN(limit) || hard === '') return notTried('DESCRIPTORS', 'no limit is told in /proc/self/limits');
  const connections = Math.floor((limit * PART_FOR_CONNECTIONS) / PER_CONNECTION);
  const seen = `hard limit ${hard}: room for ${connections} connections of all pods of the node at once`;
  const hint = 'raise it where the container runtime is started (LimitNOFILE), the proxy takes what it may';
  if (limit < TOO_FEW_DESCRIPTORS) return failed('DESCRIPTORS', seen, hint);
  return limit < FEW_DESCRIPTORS ? warning('DESCRIPTORS', seen, hint) : ok('DESCRIPTORS', seen);
}

/** @param read gives the text of a file below /proc/sys, undefined where there is none */
export function settingFindings(read: (name: string) => string | undefined = readSetting): Finding[] {
  const jit = read('net/core/bpf_jit_enable');
  const unprivileged = read('kernel/unprivileged_bpf_disabled');
  return [
    jit === undefined
      ? notTried('BPF_JIT', 'there is no net.core.bpf_jit_enable here')
      : jit === '0'
        ? warning(
            'BPF_JIT',
            'net.core.bpf_jit_enable is 0: programs are interpreted, each connection and packet costs more',
            'sysctl -w net.core.bpf_jit_enable=1',
          )
        : ok('BPF_JIT', `net.core.bpf_jit_enable is ${jit}`),
    unprivileged === undefined
      ? notTried('UNPRIVILEGED_BPF', 'there is no kernel.unprivileged_bpf_disabled here')
      : unprivileged === '0'
        ? warning(
            'UNPRIVILEGED_BPF',
            'kernel.unprivileged_bpf_disabled is 0: any process of any pod may load some kinds of programs',
            'sysctl -w kernel.unprivileged_bpf_disabled=2',
          )
        : ok('UNPRIVILEGED_BPF', `kernel.unprivileged_bpf_disabled is ${unprivileged}`),
  ];
}

function readSetting(name: string): string | undefined {
  try {
    return readFileSync(`/proc/sys/${name}`, 'utf8').trim();
  } catch {
    return undefined;
  }
}
