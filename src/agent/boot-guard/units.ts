/** What the boot guard is to systemd: two units, and the links by which they are started. */
import { basename, join } from 'node:path';

/** What becomes of a boot whose guard fails: pods start unguarded and the unit's failure says so, or the kubelet does not start. */
export type OnFailure = 'continue' | 'stop';

/** What the guard on a node is told. Paths are the host's. */
export interface BootGuardOptions {
  /** As in spec.nodeName of its pods. */
  readonly nodeName: string;
  /** Where the agent pins. */
  readonly bpffs: string;
  /** Directory in which the agent reads what became of the guard. */
  readonly runDirectory: string;
  /** Cgroup below which this node's pods are, where several nodes share a kernel. */
  readonly podCgroup?: string;
  readonly onFailure: OnFailure;
  /** Seconds after which the node is freed when the kubelet starts other pods and none of the DaemonSet. */
  readonly releaseAfter: number | 'never';
  /** NAMESPACE/NAME */
  readonly daemonSet: string;
  /** Directory of the executable. */
  readonly execDirectory: string;
}

/** A file system of the host may be read-only but for a few directories; this is one on most, and programs run from it. */
export const DEFAULT_EXEC_DIRECTORY = '/opt/ebbtide/bin';
export const EXECUTABLE = 'ebbtide-boot-guard';
export const UNIT_DIRECTORY = '/etc/systemd/system';
export const GUARD_UNIT = 'ebbtide-boot-guard.service';
export const WAIT_UNIT = 'ebbtide-boot-guard-wait.service';
/** Name of the report in the run directory. */
export const REPORT_FILE = 'boot-guard.json';

/** Whoever starts pods, by distribution: kubeadm and most others, k3s, RKE2, k0s, MicroK8s. */
export const KUBELET_UNITS = [
  'kubelet.service',
  'k3s.service',
  'k3s-agent.service',
  'rke2-server.service',
  'rke2-agent.service',
  'k0scontroller.service',
  'k0sworker.service',
  'snap.microk8s.daemon-kubelite.service',
] as const;
/** Runtimes that may start containers of before the boot by themselves. */
const RUNTIME_UNITS = [
  'containerd.service',
  'crio.service',
  'docker.service',
  'snap.microk8s.daemon-containerd.service',
];
const BOOT_TARGET = 'multi-user.target';
const GUARD_TIMEOUT_S = 20;

/** Links in the unit directory, relative to it, by which the units are enabled; as `systemctl enable` would make them. */
export function links({ onFailure }: Pick<BootGuardOptions, 'onFailure'>): string[] {
  const kind = onFailure === 'stop' ? 'requires' : 'wants';
  return [
    `${BOOT_TARGET}.wants/${GUARD_UNIT}`,
    `${BOOT_TARGET}.wants/${WAIT_UNIT}`,
    ...KUBELET_UNITS.map((unit) => `${unit}.${kind}/${GUARD_UNIT}`),
  ];
}

/** Every link that {@link links} could have made. */
export function allLinks(): string[] {
  return [...new Set([...links({ onFailure: 'continue' }), ...links({ onFailure: 'stop' })])];
}

/** @returns text of the units by file name. @throws Error for what cannot be in a unit */
export function units(options: BootGuardOptions): Record<string, string> {
  const { nodeName, bpffs, runDirectory, podCgroup, daemonSet, releaseAfter, execDirectory } = options;
  const program = join(execDirectory, EXECUTABLE);
  const common = ['--node', nodeName, '--bpffs', bpffs, '--report', join(runDirectory, REPORT_FILE)];
  const scope = podCgroup === undefined ? [] : ['--pod-cgroup', podCgroup];
  const guard = [program, 'guard', ...common, ...scope, '--timeout', String(GUARD_TIMEOUT_S)];
  const disable = links(options).flatMap((link) => ['--disable', join(UNIT_DIRECTORY, link)]);
  const after = ['--release-after', String(releaseAfter)];
  const wait = [program, 'wait', ...common, '--daemonset', daemonSet, ...after, ...disable];
  for (const word of [...guard, ...wait]) {
    // systemd reads quotes, % and $; none of them is in the path of a well-kept node.
    if (!/^[\w./:@-]+$/.test(word)) throw new Error(`${JSON.stringify(word)} cannot be part of a systemd unit`);
  }
  return {
    [GUARD_UNIT]: `# Written by ebbtide boot-guard install; taken away by ebbtide boot-guard remove.
[Unit]
Description=Ebbtide boot guard: new pods have no TCP until the node's agent has decided about them
RequiresMountsFor=${bpffs} ${execDirectory} ${runDirectory}
Before=${[...KUBELET_UNITS, ...RUNTIME_UNITS].join(' ')}

[Service]
Type=oneshot
RemainAfterExit=yes
TimeoutStartSec=${GUARD_TIMEOUT_S + 10}
ExecStart=${guard.join(' ')}

[Install]
WantedBy=${BOOT_TARGET}
${options.onFailure === 'stop' ? 'RequiredBy' : 'WantedBy'}=${KUBELET_UNITS.join(' ')}
`,
    [WAIT_UNIT]: `# Written by ebbtide boot-guard install; taken away by ebbtide boot-guard remove.
[Unit]
Description=Ebbtide boot guard: frees the node where the mesh went away while it was off
After=${GUARD_UNIT}
RequiresMountsFor=${execDirectory}

[Service]
Type=simple
ExecStart=${wait.join(' ')}
Restart=on-failure
RestartSec=10

[Install]
WantedBy=${BOOT_TARGET}
`,
  };
}

/** What a link points to. */
export const targetOf = (link: string): string => `../${basename(link)}`;
