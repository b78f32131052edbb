/** What the agent can be told: every flag and environment name of `ebbtide agent` is read here, with its default. */
import { join, resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { PIN_DIRECTORY_NAME } from './capture.js';
import { checkCapabilities, checkCgroup } from './machine.js';
import { DEFAULT_BPFFS, provideBpffs, provideCgroupRoot } from './mounts.js';
import type { ProxyNetns } from './proxy-place.js';

export interface AgentSettings {
  /** The node whose pods this agent enrols, as `spec.nodeName` has it. */
  readonly nodeName: string;
  /** Folder of Kubernetes manifests, watched. */
  readonly manifests: string;
  /** Path of the ZDS socket. */
  readonly zdsSocket: string;
  /** Path of the socket on which the agent tells its status over HTTP. */
  readonly statusSocket: string;
  /** Directory of cgroup2 whose processes are captured. */
  readonly cgroup: string;
  /** Where the bpffs is; a path of this process where it is outside of its mount namespace. */
  readonly bpffs: string;
  /** The agent mounted it. */
  readonly bpffsMounted: boolean;
  /** Directory of the agent's pins. */
  readonly pinDirectory: string;
  /** Network namespaces in which a proxy may run. */
  readonly proxyNetns: ProxyNetns;
  /** At the end leave all pods captured, for the agent that comes next. */
  readonly keep: boolean;
}

interface RawOptions {
  readonly manifests: string;
  readonly cgroup?: string;
  readonly bpffs: string;
  readonly keep: boolean;
  readonly proxyNetns: ProxyNetns;
}

const DEFAULT_ZDS_SOCKET = '/var/run/ztunnel/ztunnel.sock';

/** Path of the status socket that belongs to a ZDS socket. */
export const statusSocketOf = (zdsSocket: string): string => `${zdsSocket}.status`;

/** The ZDS socket's path by the environment. */
export const zdsSocketOf = (env: NodeJS.ProcessEnv): string => env.INPOD_UDS || DEFAULT_ZDS_SOCKET;

/** Pin directory of a node's agent: several agents may share a bpffs. A bpffs refuses dots, and no node has underscores. */
export function pinDirectoryOf(bpffs: string, nodeName: string): string {
  return join(bpffs, `${PIN_DIRECTORY_NAME}-${nodeName.replaceAll('.', '_')}`);
}

/** Declares the flags of `ebbtide agent`; {@link readSettings} reads them. */
export function addOptions(command: Command): Command {
  const manifests = process.env.EBBTIDE_MANIFESTS;
  const text = 'folder of Kubernetes manifests, watched for changes (env EBBTIDE_MANIFESTS)';
  if (manifests === undefined) command.requiredOption('--manifests <dir>', text);
  else command.option('--manifests <dir>', text, manifests);
  return command
    .option('--cgroup <dir>', 'capture what runs below this directory of cgroup2 (default: the root of cgroup2)')
    .option('--bpffs <dir>', 'where programs and maps are pinned; a bpffs is mounted there if none is', DEFAULT_BPFFS)
    .option(
      '--keep',
      'leave all pods captured at the end, for the agent that comes next (env EBBTIDE_KEEP_ON_EXIT=true)',
      process.env.EBBTIDE_KEEP_ON_EXIT === 'true',
    )
    .addOption(
      new Option(
        '--proxy-netns <which>',
        "where a proxy may run: in the agent's own network namespace, or in any that is no pod's (for a ztunnel in a pod)",
      )
        .choices(['own', 'any'])
        .default('own')
        .env('EBBTIDE_PROXY_NETNS'),
    )
    .addHelpText(
      'after',
      `\nEnvironment:\n  NODE_NAME  the node whose pods are enrolled; required\n  INPOD_UDS  ZDS socket (default ${DEFAULT_ZDS_SOCKET}); status is at the same path + .status\n  EBBTIDE_LOG  log level (default info)`,
    );
}

/**
 * Reads what {@link addOptions} declared, and looks whether this machine can do it.
 * @throws Error that says what is missing and what to do
 */
export function readSettings(options: RawOptions, env: NodeJS.ProcessEnv = process.env): AgentSettings {
  const nodeName = env.NODE_NAME ?? '';
  if (!/^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$/.test(nodeName)) {
    const what = nodeName === '' ? 'is not set' : `is ${JSON.stringify(nodeName)}, which is no name of a Node`;
    throw new Error(`NODE_NAME ${what}; set it to the name of this node as in spec.nodeName of its pods`);
  }
  checkCapabilities();
  const cgroup = options.cgroup === undefined ? provideCgroupRoot() : resolve(options.cgroup);
  checkCgroup(cgroup);
  const bpffs = resolve(options.bpffs);
  const found = provideBpffs(bpffs);
  const zdsSocket = zdsSocketOf(env);
  return {
    nodeName,
    manifests: options.manifests,
    zdsSocket,
    statusSocket: statusSocketOf(zdsSocket),
    cgroup,
    bpffs: found.path,
    bpffsMounted: found.mounted,
    pinDirectory: pinDirectoryOf(found.path, nodeName),
    proxyNetns: options.proxyNetns,
    keep: options.keep,
  };
}
