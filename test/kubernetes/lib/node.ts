/**
 * One node of a cluster on this machine: containerd, kubelet and kube-proxy in a network namespace and a mount namespace of
 * their own, in which `/run`, `/var/log` and `/sys/fs/bpf` are the node's alone. The process ids and the kernel are the
 * machine's.
 */
import { existsSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { type Finished, must, run } from '../../../src/lab/exec.ts';
import { cgroup2Root } from '../../../src/lab/ground.ts';
import { LabProcess, type Place, placed } from '../../../src/lab/process.ts';
import { Hopeless, waitFor } from '../../../src/lab/wait.ts';
import { binary } from './binaries.ts';
import type { ControlPlane } from './control-plane.ts';
import { CLUSTER_DOMAIN } from './control-plane.ts';
import { PAUSE_IMAGE } from './images.ts';

export interface ClusterNodeOptions {
  readonly name: string;
  /** Network namespace of the node, and the cgroup2 directory below which everything of it runs. */
  readonly place: Place;
  /** The kubelet's cgroup root as a path of every cgroup hierarchy; exists in all. */
  readonly cgroupRoot: string;
  /** Directory on a disk. */
  readonly directory: string;
  readonly addresses: readonly string[];
  /** Ranges of the node's pods, one of each family. */
  readonly podRanges: readonly string[];
  readonly plane: ControlPlane;
}

/** Folders of the machine in whose place the node has its own. */
const OWN_FOLDERS = ['/run', '/var/log', '/var/lib/kubelet', '/etc/systemd/system'] as const;

/** Pods of this name get their network late: the namespace is there without an interface, and then with one but unknown. */
export const SLOW_POD = 'slow-network';
/** How late, twice. */
export const SLOW_SECONDS = 2;
/** In the place of the plugin, which it runs. */
const SLOW_PLUGIN = `#!/bin/sh
export CNI_PATH=/usr/lib/cni
case "$CNI_COMMAND;$CNI_ARGS;" in
ADD*";K8S_POD_NAME=${SLOW_POD};"*)
  sleep ${SLOW_SECONDS}
  answer=$(/usr/lib/cni/ptp) || exit
  sleep ${SLOW_SECONDS}
  printf '%s' "$answer"
  ;;
*) exec /usr/lib/cni/ptp ;;
esac
`;

export class ClusterNode {
  readonly name: string;
  readonly options: ClusterNodeOptions;
  #containerd: LabProcess | undefined;
  #kubelet: LabProcess | undefined;
  #kubeProxy: LabProcess | undefined;

  constructor(options: ClusterNodeOptions) {
    this.name = options.name;
    this.options = options;
  }

  get processes(): LabProcess[] {
    return [this.#containerd, this.#kubelet, this.#kubeProxy].filter((process) => process !== undefined);
  }

  get kubelet(): LabProcess {
    if (this.#kubelet === undefined) throw new Error(`the kubelet of ${this.name} was not started`);
    return this.#kubelet;
  }

  /** Starts the runtime and waits until it answers; images can be imported then. */
  async startRuntime(): Promise<void> {
    this.#writeFiles();
    const config = join(this.options.directory, 'containerd.toml');
    const own = OWN_FOLDERS.map((folder) => `mount --bind '${this.#own(folder)}' ${folder}`);
    const script = [
      `mkdir -p ${OWN_FOLDERS.join(' ')}`,
      // Volumes that kubelet mounts must be seen by the runtime and by pods that ask for it.
      'mount --make-rshared /',
      // The folders are below one that gets hidden: each is opened through the disk's own path.
      ...own,
      'mount -t bpf bpf /sys/fs/bpf',
      // What is machine-wide on a real node: its network namespace, and the cgroup below which its pods are.
      'mkdir -p /run/netns /run/cgroup/all /run/cgroup/pods && touch /run/netns/node',
      'mount --bind /proc/self/ns/net /run/netns/node',
      'mount --rbind /sys/fs/cgroup /run/cgroup/all',
      `mount --bind '${join(cgroup2Root(), this.options.cgroupRoot)}' /run/cgroup/pods`,
      'exec "$@"',
    ].join(' && ');
    const argv = ['unshare', '--mount', '--propagation', 'private', 'sh', '-c', script, 'sh'];
    this.#containerd = await this.#start('containerd', [...argv, 'containerd', '--config', config], false);
    const containerd = this.#containerd;
    await waitFor(
      `containerd of ${this.name} to answer`,
      async () => {
        if (!containerd.running) throw new Hopeless(`it ended with ${containerd.fate}`);
        return (await this.ctr(['version'])).code === 0;
      },
      { timeoutMs: 60_000, intervalMs: 200, hint: () => containerd.tail() },
    );
  }

  /** Starts kubelet and kube-proxy. */
  async startKubelet(): Promise<void> {
    const { plane, directory } = this.options;
    this.#kubelet = await this.#start('kubelet', [
      binary('kubelet'),
      `--config=${join(directory, 'kubelet.yaml')}`,
      `--kubeconfig=${plane.kubeconfig(this.name)}`,
      `--hostname-override=${this.name}`,
      `--node-ip=${this.options.addresses.join(',')}`,
      `--root-dir=${join(directory, 'kubelet')}`,
    ]);
    this.#kubeProxy = await this.#start('kube-proxy', [
      binary('kube-proxy'),
      `--config=${join(directory, 'kube-proxy.yaml')}`,
    ]);
  }

  async stopKubelet(): Promise<void> {
    await this.#kubelet?.stop();
  }

  /** Runs `ctr` against the node's runtime, in the namespace of Kubernetes. */
  ctr(argv: readonly string[]): Promise<Finished> {
    return run(['ctr', '--address', this.#socket(), '-n', 'k8s.io', ...argv], { timeoutMs: 180_000 });
  }

  /** Brings an image (a docker-archive tar) into the node's runtime. */
  async importImage(tar: string): Promise<void> {
    await must(['ctr', '--address', this.#socket(), '-n', 'k8s.io', 'images', 'import', tar], { timeoutMs: 180_000 });
  }

  /** Runs a command in the node's network and mount namespaces. */
  run(argv: readonly string[], input?: string): Promise<Finished> {
    return run(placed(this.options.place, this.#entered(argv)), {
      timeoutMs: 60_000,
      ...(input === undefined ? {} : { input }),
    });
  }

  #entered(argv: readonly string[]): string[] {
    if (this.#containerd === undefined) throw new Error(`the runtime of ${this.name} was not started`);
    return ['nsenter', `--mount=/proc/${this.#containerd.pid}/ns/mnt`, '--', ...argv];
  }

  #start(name: string, argv: readonly string[], entered = true): Promise<LabProcess> {
    const log = join(this.options.directory, `${name}.log`);
    return LabProcess.start(`${name} of ${this.name}`, this.options.place, entered ? this.#entered(argv) : argv, {
      log,
    });
  }

  #own(folder: string): string {
    const path = join(this.options.directory, 'root', folder);
    if (!existsSync(path)) mkdirSync(path, { recursive: true });
    return path;
  }

  get #cni(): string {
    return join(this.options.directory, 'cni');
  }

  get #plugins(): string {
    return join(this.options.directory, 'cni-plugins');
  }

  #socket(): string {
    return join(this.#own('/run'), 'containerd.sock');
  }

  #writeFiles(): void {
    const { directory, podRanges, plane, cgroupRoot } = this.options;
    mkdirSync(directory, { recursive: true });
    writeFileSync(
      join(directory, 'containerd.toml'),
      [
        'version = 2',
        `root = "${join(directory, 'containerd')}"`,
        'state = "/run/containerd"',
        '[grpc]',
        'address = "/run/containerd.sock"',
        '[plugins."io.containerd.grpc.v1.cri"]',
        `sandbox_image = "${PAUSE_IMAGE}"`,
        // Without CAP_SYS_RESOURCE a lower score than one's own cannot be set.
        'restrict_oom_score_adj = true',
        '[plugins."io.containerd.grpc.v1.cri".cni]',
        `bin_dir = "${this.#plugins}"`,
        `conf_dir = "${this.#cni}"`,
        '',
      ].join('\n'),
    );
    mkdirSync(this.#cni, { recursive: true });
    mkdirSync(this.#plugins, { recursive: true });
    writeFileSync(join(this.#plugins, 'ptp'), SLOW_PLUGIN, { mode: 0o755 });
    // Which the runtime runs by itself.
    symlinkSync('/usr/lib/cni/loopback', join(this.#plugins, 'loopback'));
    const ipam = {
      type: 'host-local',
      dataDir: join(directory, 'addresses'),
      ranges: podRanges.map((subnet) => [{ subnet }]),
      routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
    };
    writeFileSync(
      join(this.#cni, '10-lab.conflist'),
      JSON.stringify({ cniVersion: '1.0.0', name: 'lab', plugins: [{ type: 'ptp', ipMasq: false, ipam }] }),
    );
    writeFileSync(
      join(directory, 'kubelet.yaml'),
      stringify({
        apiVersion: 'kubelet.config.k8s.io/v1beta1',
        kind: 'KubeletConfiguration',
        authentication: { anonymous: { enabled: true }, webhook: { enabled: false } },
        authorization: { mode: 'AlwaysAllow' },
        cgroupDriver: 'cgroupfs',
        cgroupRoot,
        enforceNodeAllocatable: [],
        failCgroupV1: false,
        failSwapOn: false,
        clusterDNS: [plane.address],
        clusterDomain: CLUSTER_DOMAIN,
        containerRuntimeEndpoint: 'unix:///run/containerd.sock',
        evictionHard: { 'memory.available': '1%', 'nodefs.available': '1%', 'imagefs.available': '1%' },
        imageMinimumGCAge: '24h',
        imageGCHighThresholdPercent: 100,
        maxPods: 250,
        registerWithTaints: [],
        resolvConf: '',
        volumePluginDir: join(directory, 'plugins'),
        kubeAPIQPS: 100,
        kubeAPIBurst: 200,
      }),
    );
    writeFileSync(
      join(directory, 'kube-proxy.yaml'),
      stringify({
        apiVersion: 'kubeproxy.config.k8s.io/v1alpha1',
        kind: 'KubeProxyConfiguration',
        clientConnection: { kubeconfig: plane.kubeconfig('kube-proxy') },
        hostnameOverride: this.name,
        mode: 'nftables',
        detectLocalMode: 'ClusterCIDR',
        clusterCIDR: '10.244.0.0/16,fd00:244::/32',
        conntrack: { maxPerCore: 0 },
      }),
    );
  }
}
