/** `ebbtide boot-guard`: puts the guard of new pods between boot and agent on a node, takes it away, tells how it is. */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { Command, Option } from 'commander';
import { inspect, install, readBootReport, remove } from '../agent/boot-guard/index.js';
import { addBootGuardOptions, type RawBootGuard, readBootGuard } from '../agent/boot-guard/settings.js';
import { DEFAULT_BPFFS } from '../agent/mounts.js';
import { pinDirectoryOf, zdsSocketOf } from '../agent/settings.js';

/** Done, or all is as it should be. */
const OK = 0;
const NOT_WELL = 1;
const CANNOT = 2;
/** Directory below a version's pins while they are the guard's (native/capture/pins.h). */
const MARK = 'boot-guard';

interface NodeFlags {
  readonly hostRoot: string;
  readonly node?: string;
  readonly bpffs: string;
}

/** `ebbtide boot-guard install|remove|status`. Exit code: 0 well, 1 not installed or not well, 2 it cannot be done here. */
export function bootGuardCommand(): Command {
  const command = new Command('boot-guard')
    .description(
      "Hold new pods between a node's boot and its agent: install, remove or show the node's boot guard (needs systemd).",
    )
    .addHelpText(
      'after',
      '\nExit code: 0 done, or installed and well; 1 not installed, other than by these flags, or this boot was not guarded; ' +
        '2 it cannot be done on this node',
    );
  command.addCommand(
    addBootGuardOptions(
      nodeFlags('install', 'write the executable and the systemd units; guards from the next boot on'),
    ).action((flags: NodeFlags & RawBootGuard) => finish(() => installOn(flags))),
  );
  command.addCommand(
    addBootGuardOptions(nodeFlags('remove', 'take them away, and free the node where no agent has taken over')).action(
      (flags: NodeFlags & RawBootGuard) => finish(() => removeFrom(flags)),
    ),
  );
  command.addCommand(
    addBootGuardOptions(nodeFlags('status', 'tell what is installed, and what became of it at the last boot')).action(
      (flags: NodeFlags & RawBootGuard) => finish(() => statusOf(flags)),
    ),
  );
  return command;
}

function nodeFlags(name: string, description: string): Command {
  return new Command(name)
    .description(description)
    .option('--host-root <dir>', "the node's root file system", '/')
    .addOption(new Option('--node <name>', 'this node, as in spec.nodeName of its pods').env('NODE_NAME'))
    .option('--bpffs <dir>', 'where the agent pins', DEFAULT_BPFFS);
}

function finish(work: () => number): void {
  try {
    process.exitCode = work();
  } catch (error) {
    process.stderr.write(`${(error as Error).message}\n`);
    process.exitCode = CANNOT;
  }
}

function optionsOf({ node, bpffs, ...raw }: NodeFlags & RawBootGuard): ReturnType<typeof readBootGuard> {
  if (!/^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$/.test(node ?? '')) {
    throw new Error('give --node NAME, the name of this node as in spec.nodeName of its pods');
  }
  return readBootGuard(raw, { nodeName: node ?? '', bpffs, runDirectory: dirname(zdsSocketOf(process.env)) });
}

function installOn(flags: NodeFlags & RawBootGuard): number {
  const written = install(resolve(flags.hostRoot), optionsOf(flags));
  for (const path of written) process.stdout.write(`wrote ${path}\n`);
  reload(flags.hostRoot);
  process.stdout.write('the boot guard is installed; new pods are guarded from the next boot on\n');
  return OK;
}

function removeFrom({ hostRoot, bpffs, bootGuardExec }: NodeFlags & RawBootGuard): number {
  const removed = remove(resolve(hostRoot), resolve(bootGuardExec));
  for (const path of removed) process.stdout.write(`removed ${path}\n`);
  if (removed.length > 0) reload(hostRoot);
  for (const directory of guardedPins(bpffs)) {
    // Only what no agent has taken over; it looks again under the lock.
    const program = new URL('../../native/build/Release/ebbtide-boot-guard', import.meta.url).pathname;
    const { status, stderr } = spawnSync(program, ['release', '--pins', directory], { encoding: 'utf8' });
    process.stdout.write(`${directory}: ${stderr.trim()}\n`);
    if (status !== 0) return NOT_WELL;
  }
  if (removed.length === 0) process.stdout.write('no boot guard is installed\n');
  return OK;
}

function statusOf(flags: NodeFlags & RawBootGuard): number {
  const options = optionsOf(flags);
  const { state, lacking } = inspect(resolve(flags.hostRoot), options);
  process.stdout.write(`${state}\n${lacking.map((each) => `  ${each}\n`).join('')}`);
  const report = readBootReport(join(resolve(flags.hostRoot), options.runDirectory));
  process.stdout.write(
    report === undefined
      ? 'at this boot it did not run\n'
      : `at this boot, ${report.uptimeSeconds.toFixed(1)} s after it: ${report.state}: ${report.message}\n`,
  );
  const pins = pinDirectoryOf(flags.bpffs, options.nodeName);
  const waiting = guardedPins(flags.bpffs).includes(pins);
  process.stdout.write(waiting ? `new pods are held until an agent comes (${pins})\n` : 'no agent is waited for\n');
  const failed = report !== undefined && (report.state === 'failed' || report.state === 'other version');
  return state === 'installed' && !failed ? OK : NOT_WELL;
}

/** Pin directories in which a guard waits for its agent. */
function guardedPins(bpffs: string): string[] {
  const directories = (path: string): string[] =>
    existsSync(path)
      ? readdirSync(path, { withFileTypes: true })
          .filter((entry) => entry.isDirectory())
          .map(({ name }) => join(path, name))
      : [];
  return directories(bpffs).filter((pins) => directories(pins).some((version) => existsSync(join(version, MARK))));
}

/** Only where this is the node itself; elsewhere systemd reads the units at the next boot. */
function reload(hostRoot: string): void {
  if (resolve(hostRoot) === '/' && existsSync('/run/systemd/system')) {
    spawnSync('systemctl', ['daemon-reload'], { stdio: 'ignore', timeout: 30_000 });
  }
}
