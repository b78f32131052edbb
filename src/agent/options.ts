/** What the agent can be told: every flag and environment name of `ebbtide agent`, with its default. */
import { type Command, Option } from 'commander';
import { EXCLUDED_NAMESPACES } from '../mesh/labels.js';
import { AGENT_PORT } from '../mesh/ports.js';
import { addBootGuardOptions, type RawBootGuard } from './boot-guard/settings.js';
import { DEFAULT_BPFFS } from './mounts.js';
import type { ProxyNetns } from './proxy-place.js';

export const DEFAULT_ZDS_SOCKET = '/var/run/ztunnel/ztunnel.sock';
export const DEFAULT_READY_PATIENCE_S = 30;

/** What commander makes of the flags. */
export interface RawOptions extends RawBootGuard {
  readonly bootGuard?: string;
  readonly manifests?: string;
  readonly kubeconfig?: string;
  readonly cgroup?: string;
  readonly bpffs: string;
  readonly hostProc: string;
  readonly cniNetns: string;
  readonly hostNetns?: string;
  readonly kubeletPort: string;
  readonly hold?: 'refuse' | 'allow' | 'off';
  readonly podCgroup?: string;
  readonly guard: 'auto' | 'clsact';
  readonly port?: string;
  readonly keep?: boolean;
  readonly takeOver?: boolean;
  readonly rootCert?: string;
  readonly proxyNetns: ProxyNetns;
}

/** Declares the flags of `ebbtide agent`; readSettings of settings.ts reads them. */
export function addOptions(command: Command): Command {
  addBootGuardOptions(
    command.addOption(
      new Option(
        '--boot-guard <dir>',
        "install the boot guard on the node, whose root file system is there (or at least /etc/systemd/system and the executable's " +
          'directory), and take it away where all pods are let go at the end',
      ).env('EBBTIDE_BOOT_GUARD'),
    ),
  );
  return command
    .addOption(
      new Option(
        '--manifests <dir>',
        'folder of Kubernetes manifests, watched for changes; without it the Kubernetes API is asked',
      ).env('EBBTIDE_MANIFESTS'),
    )
    .addOption(
      new Option('--kubeconfig <file>', "how to reach the Kubernetes API (default: by the pod's service account)").env(
        'EBBTIDE_KUBECONFIG',
      ),
    )
    .option('--cgroup <dir>', 'capture what runs below this directory of cgroup2 (default: the root of cgroup2)')
    .option('--bpffs <dir>', 'where programs and maps are pinned; a bpffs is mounted there if none is', DEFAULT_BPFFS)
    .addOption(
      new Option('--host-proc <dir>', "the node's /proc, by which network namespaces of pods are found")
        .default('/proc')
        .env('EBBTIDE_HOST_PROC'),
    )
    .addOption(
      new Option(
        '--host-netns <path>',
        "the node's network namespace (default: the kubelet's, or that of process 1)",
      ).env('EBBTIDE_HOST_NETNS'),
    )
    .addOption(
      new Option('--kubelet-port <port>', 'port by which the kubelet is known, whose probes reach captured pods')
        .default('10250')
        .env('EBBTIDE_KUBELET_PORT'),
    )
    .addOption(
      new Option(
        '--hold <how>',
        'new pods until it is known whether they belong in the mesh, also while no agent runs: refuse them TCP, allow it ' +
          'in clear, or hold none at all, also not until they are captured (default: refuse, off with --manifests)',
      )
        .choices(['refuse', 'allow', 'off'])
        .env('EBBTIDE_HOLD'),
    )
    .addOption(
      new Option(
        '--pod-cgroup <dir>',
        "directory of cgroup2 below which this node's pods are, where several nodes share a kernel (default: what the agent's own pod is below, " +
          'where it sees that; else all)',
      ).env('EBBTIDE_POD_CGROUP'),
    )
    .addOption(
      new Option(
        '--guard <how>',
        'how raw packets of captured pods are stopped at the host side of their veth: by tcx where the kernel has it (6.6), else by clsact; or ' +
          'by clsact in any case, for tests and beside tools that cannot live with tcx',
      )
        .choices(['auto', 'clsact'])
        .default('auto')
        .env('EBBTIDE_GUARD'),
    )
    .addOption(
      new Option('--cni-netns <dir>', 'where the container runtime mounts network namespaces')
        .default('/var/run/netns')
        .env('EBBTIDE_CNI_NETNS'),
    )
    .addOption(
      new Option(
        '--port <port>',
        `metrics and readiness over HTTP; "none" for none (default: ${AGENT_PORT}, none with --manifests)`,
      ).env('EBBTIDE_AGENT_PORT'),
    )
    .addOption(
      new Option(
        '--keep',
        'leave all pods captured at the end, for the agent that comes next (default: with the Kubernetes API unless the ' +
          "agent's DaemonSet is deleted; env EBBTIDE_KEEP_ON_EXIT=true or false)",
      ),
    )
    .option('--no-keep', 'at the end let all pods go and take everything out of the kernel')
    .option(
      '--take-over',
      'ask an agent that has this node for it, and give it to the next that asks (default: with the Kubernetes API)',
    )
    .option('--no-take-over', 'fail where another agent has this node')
    .addOption(
      new Option(
        '--root-cert <file>',
        "the mesh's root certificates, which the kubelet makes of a ConfigMap for the proxy in the agent's pod: until the file is there the " +
          'kubelet is made to look for it',
      ).env('EBBTIDE_ROOT_CERT'),
    )
    .addOption(
      new Option(
        '--proxy-netns <which>',
        "where a proxy may run: in the agent's own network namespace or that of a pod of its DaemonSet, or in any that is no " +
          "pod's of the mesh (for a ztunnel in a pod)",
      )
        .choices(['own', 'any'])
        .default('own')
        .env('EBBTIDE_PROXY_NETNS'),
    )
    .addHelpText(
      'after',
      `\nEnvironment:\n  NODE_NAME  the node whose pods are enrolled; required\n  INPOD_UDS  ZDS socket (default ${DEFAULT_ZDS_SOCKET}); status is at the same path + .status\n  EXCLUDE_NAMESPACES  namespaces whose pods are never captured, separated by commas (default ${EXCLUDED_NAMESPACES.join(',')})\n  POD_NAME, POD_NAMESPACE  the agent's own pod, whose DaemonSet tells whether to let all pods go at the end\n  POD_UID  UID of the agent's own pod, which must not be held: the agent could not ask the Kubernetes API\n  EBBTIDE_READY_PATIENCE_SECONDS  how long a pod that cannot be enrolled keeps the agent from being ready (default ${DEFAULT_READY_PATIENCE_S})\n  EBBTIDE_LOG  log level (default info)`,
    );
}
