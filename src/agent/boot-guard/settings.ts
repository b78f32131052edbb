/** Flags of the boot guard, for the agent that installs it and for `ebbtide boot-guard` by hand. */
import { resolve } from 'node:path';
import { type Command, Option } from 'commander';
import type { OwnPod } from '../daemonset.js';
import { type BootGuardOptions, DEFAULT_EXEC_DIRECTORY, type OnFailure } from './units.js';

/** What commander makes of the flags. */
export interface RawBootGuard {
  readonly bootGuardOnFailure: OnFailure;
  readonly bootGuardReleaseAfter: string;
  readonly bootGuardDaemonset?: string;
  readonly bootGuardExec: string;
  readonly bootGuardBpffs?: string;
  readonly bootGuardRun?: string;
}

/** What the agent knows anyway. */
export interface NodeFacts {
  readonly nodeName: string;
  readonly bpffs: string;
  readonly runDirectory: string;
  readonly podCgroup?: string | undefined;
  readonly ownPod?: OwnPod | undefined;
}

const DEFAULT_RELEASE_AFTER_S = 600;

/** Declares the flags; {@link readBootGuard} reads them. */
export function addBootGuardOptions(command: Command): Command {
  return command
    .addOption(
      new Option(
        '--boot-guard-on-failure <what>',
        'after a boot at which the guard fails: "continue", pods start unguarded and the unit has failed; or "stop", the kubelet ' +
          'is not started',
      )
        .choices(['continue', 'stop'])
        .default('continue')
        .env('EBBTIDE_BOOT_GUARD_ON_FAILURE'),
    )
    .addOption(
      new Option(
        '--boot-guard-release-after <seconds>',
        "how long after a boot the kubelet must have been starting other pods, and none of the agent's DaemonSet, before the " +
          'node is freed; or "never"',
      )
        .default(String(DEFAULT_RELEASE_AFTER_S))
        .env('EBBTIDE_BOOT_GUARD_RELEASE_AFTER'),
    )
    .addOption(
      new Option(
        '--boot-guard-daemonset <namespace/name>',
        "that DaemonSet (default: by the agent's own pod; without one the node is never freed)",
      ).env('EBBTIDE_BOOT_GUARD_DAEMONSET'),
    )
    .addOption(
      new Option(
        '--boot-guard-exec <dir>',
        'directory of the node for the executable; programs must be allowed to run there',
      )
        .default(DEFAULT_EXEC_DIRECTORY)
        .env('EBBTIDE_BOOT_GUARD_EXEC'),
    )
    .addOption(
      new Option(
        '--boot-guard-bpffs <dir>',
        'the bpffs as the node has it, where that is another path (default: --bpffs)',
      ).env('EBBTIDE_BOOT_GUARD_BPFFS'),
    )
    .addOption(
      new Option(
        '--boot-guard-run <dir>',
        "directory of the ZDS socket as the node has it, for the guard's report (default: that of INPOD_UDS)",
      ).env('EBBTIDE_BOOT_GUARD_RUN'),
    );
}

/** @throws Error that says which setting is wrong */
export function readBootGuard(raw: RawBootGuard, facts: NodeFacts): BootGuardOptions {
  const { nodeName, ownPod, podCgroup } = facts;
  // A pod of a DaemonSet has its name and five characters.
  const own = ownPod === undefined ? undefined : `${ownPod.namespace}/${ownPod.name.replace(/-[a-z0-9]{5}$/, '')}`;
  const daemonSet = raw.bootGuardDaemonset || own;
  if (daemonSet !== undefined && !/^[a-z0-9-]+\/[a-z0-9.-]+$/.test(daemonSet)) {
    throw new Error(`--boot-guard-daemonset is ${JSON.stringify(daemonSet)}; give NAMESPACE/NAME`);
  }
  const text = daemonSet === undefined ? 'never' : raw.bootGuardReleaseAfter;
  if (text !== 'never' && !/^\d{1,6}$/.test(text)) {
    throw new Error(`--boot-guard-release-after is ${JSON.stringify(text)}; give a number of seconds, or "never"`);
  }
  return {
    nodeName,
    bpffs: resolve(raw.bootGuardBpffs || facts.bpffs),
    runDirectory: resolve(raw.bootGuardRun || facts.runDirectory),
    ...(podCgroup === undefined ? {} : { podCgroup }),
    onFailure: raw.bootGuardOnFailure,
    releaseAfter: text === 'never' ? 'never' : Number(text),
    daemonSet: daemonSet ?? 'none/none',
    execDirectory: resolve(raw.bootGuardExec),
  };
}
