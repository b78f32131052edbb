/** `ebbtide uninstall`: takes everything that an agent left in the kernel out of it, or the DaemonSet out of a cluster. */

import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { Command } from 'commander';
import { PIN_DIRECTORY_NAME } from '../agent/capture.js';

const EAGAIN = 11;
const DEFAULT_BPFFS = '/sys/fs/bpf';

/** `ebbtide uninstall`. */
export function uninstallCommand(): Command {
  return new Command('uninstall')
    .description('detach and unpin every BPF object of Ebbtide on this machine; captured pods become plain again')
    .option('--bpffs <directory>', 'the bpffs that the agent was given', DEFAULT_BPFFS)
    .option('--host-root <directory>', "the node's root file system, from which the boot guard is taken away", '/')
    .option(
      '--daemonset <namespace/name>',
      'instead: delete this DaemonSet of the cluster that this pod is in, and wait until its agents have let all pods go',
    )
    .option('--timeout <seconds>', 'how long to wait for that', '120')
    .action(async (options: { bpffs: string; hostRoot: string; daemonset?: string; timeout: string }) => {
      if (options.daemonset !== undefined) {
        const [namespace, name] = options.daemonset.split('/');
        const seconds = Number(options.timeout);
        if (!namespace || !name || !(seconds > 0)) {
          throw new Error(
            'give --daemonset NAMESPACE/NAME and --timeout SECONDS, such as ebbtide-system/ebbtide-node and 120',
          );
        }
        const { deleteDaemonSet } = await import('./uninstall-daemonset.js');
        await deleteDaemonSet({ namespace, name }, seconds * 1000);
        process.stdout.write(`DaemonSet ${options.daemonset} and its pods are gone\n`);
        return;
      }
      const { DEFAULT_EXEC_DIRECTORY, remove } = await import('../agent/boot-guard/index.js');
      for (const path of remove(options.hostRoot, DEFAULT_EXEC_DIRECTORY)) process.stdout.write(`removed ${path}\n`);
      const { removePins, removeStrayGuards } = await import('../agent/native-capture.js');
      for (const directory of pinDirectories(options.bpffs)) {
        const pins = removeUnused(directory, removePins);
        process.stdout.write(`removed ${pins} pins from ${directory}\n`);
      }
      const strays = removeStrayGuards();
      if (strays > 0) process.stdout.write(`removed ${strays} guards whose pins were gone\n`);
      const { releaseBpffs } = await import('../agent/mounts.js');
      if (releaseBpffs(options.bpffs)) process.stdout.write(`unmounted ${options.bpffs}\n`);
    });
}

/** @throws Error where an agent runs, which would make them again */
function removeUnused(directory: string, removePins: (directory: string) => number): number {
  try {
    return removePins(directory);
  } catch (error) {
    if ((error as { readonly errno?: number }).errno !== EAGAIN) throw error;
    throw new Error(`an agent is running with ${directory}; stop it first`, { cause: error });
  }
}

/** The agents' pin directories below a bpffs; each holds those of all versions of Ebbtide. */
function pinDirectories(bpffs: string): string[] {
  if (!existsSync(bpffs)) return [];
  return readdirSync(bpffs, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && isPinDirectory(entry.name))
    .map((entry) => join(bpffs, entry.name));
}

function isPinDirectory(name: string): boolean {
  return name === PIN_DIRECTORY_NAME || name.startsWith(`${PIN_DIRECTORY_NAME}-`);
}
