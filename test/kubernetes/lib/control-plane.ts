/** The control plane of a cluster: etcd, API server, controller manager, scheduler and DNS as processes of one place. */
import { randomBytes } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Finished, must, run } from '../../../src/lab/exec.ts';
import { LabProcess, type Place } from '../../../src/lab/process.ts';
import { waitFor } from '../../../src/lab/wait.ts';
import { apiServerFlags, etcdCommand, writeKubeconfig } from './api-commands.ts';
import { binary } from './binaries.ts';
import { type ClusterCertificates, makeCertificates } from './certificates.ts';

export const CLUSTER_DOMAIN = 'cluster.local';
export const SERVICE_RANGES = '10.96.0.0/16,fd00:96::/112';
const KUBERNETES_SERVICE = '10.96.0.1';
const API_PORT = 6443;
const ETCD_URL = 'http://127.0.0.1:2379';

export interface ControlPlaneOptions {
  readonly place: Place;
  /** Address of API server and DNS inside the place. */
  readonly address: string;
  /** Holds keys, tokens, kubeconfigs, etcd's data and logs; made if missing. */
  readonly directory: string;
  /** Names of the nodes whose kubelets get a token. */
  readonly nodes: readonly string[];
}

/** Groups by user; everyone but the kubelets may do everything. */
const MASTERS = 'system:masters';

export class ControlPlane {
  readonly address: string;
  readonly certificates: ClusterCertificates;
  readonly #options: ControlPlaneOptions;
  readonly #tokens = new Map<string, string>();
  #etcd: LabProcess | undefined;
  #apiServer: LabProcess | undefined;
  readonly #others: LabProcess[] = [];

  private constructor(options: ControlPlaneOptions, certificates: ClusterCertificates) {
    this.#options = options;
    this.address = options.address;
    this.certificates = certificates;
  }

  static async create(options: ControlPlaneOptions): Promise<ControlPlane> {
    mkdirSync(join(options.directory, 'logs'), { recursive: true, mode: 0o700 });
    const names = ['kubernetes', 'kubernetes.default', 'kubernetes.default.svc', 'localhost'].map((n) => `DNS:${n}`);
    names.push(`IP:${options.address}`, `IP:${KUBERNETES_SERVICE}`, 'IP:127.0.0.1');
    const plane = new ControlPlane(options, await makeCertificates(options.directory, names));
    const lines = ['admin,admin', 'controller-manager,admin', 'scheduler,admin', 'kube-proxy,admin', 'coredns,admin'];
    const users = lines.map((line) => line.split(',')[0] ?? '');
    const rows = users.map((user) => `${plane.#token(user)},${user},${user},"${MASTERS}"`);
    for (const node of options.nodes) {
      rows.push(`${plane.#token(node)},system:node:${node},${node},"system:nodes"`);
    }
    writeFileSync(join(options.directory, 'tokens.csv'), `${rows.join('\n')}\n`, { mode: 0o600 });
    return plane;
  }

  get url(): string {
    return `https://${this.address}:${API_PORT}`;
  }

  /** Path of a kubeconfig of a user: `admin`, or a node's name. */
  kubeconfig(user: string): string {
    const path = join(this.#options.directory, `${user}.kubeconfig`);
    const ca = readFileSync(this.certificates.ca, 'utf8');
    writeKubeconfig(path, { server: this.url, ca, token: this.#token(user) });
    return path;
  }

  /** Starts everything; resolves when the API server answers. */
  async start(): Promise<void> {
    await this.startEtcd();
    await this.startApiServer();
    const directory = this.#options.directory;
    this.#others.push(
      await this.#start('kube-controller-manager', [
        `--kubeconfig=${this.kubeconfig('controller-manager')}`,
        `--root-ca-file=${this.certificates.ca}`,
        `--service-account-private-key-file=${this.certificates.serviceAccountKey}`,
        '--leader-elect=false',
        '--allocate-node-cidrs=false',
        '--node-monitor-period=1s',
        '--bind-address=127.0.0.1',
      ]),
      await this.#start('kube-scheduler', [
        `--kubeconfig=${this.kubeconfig('scheduler')}`,
        '--leader-elect=false',
        '--bind-address=127.0.0.1',
      ]),
    );
    const corefile = join(directory, 'Corefile');
    writeFileSync(
      corefile,
      `.:53 {\n  bind ${this.address}\n  errors\n  kubernetes ${CLUSTER_DOMAIN} {\n    kubeconfig ${this.kubeconfig('coredns')} lab\n  }\n}\n`,
    );
    this.#others.push(await this.#start('coredns', ['-conf', corefile]));
  }

  async startEtcd(): Promise<void> {
    const data = join(this.#options.directory, 'etcd');
    const [, ...flags] = etcdCommand({ data, clientUrl: ETCD_URL, peerUrl: 'http://127.0.0.1:2380' });
    this.#etcd = await this.#start('etcd', flags);
  }

  /** Starts the API server, or starts it again; resolves when it answers. */
  async startApiServer(): Promise<void> {
    const { certificates, address } = this;
    this.#apiServer = await this.#start('kube-apiserver', [
      ...apiServerFlags({
        etcdUrl: ETCD_URL,
        tokenKeys: { check: certificates.serviceAccountKey, sign: certificates.serviceAccountKey },
        users: join(this.#options.directory, 'tokens.csv'),
        serviceRanges: SERVICE_RANGES,
        address,
        port: API_PORT,
      }),
      '--enable-admission-plugins=NodeRestriction',
      `--tls-cert-file=${certificates.serverCertificate}`,
      `--tls-private-key-file=${certificates.serverKey}`,
      `--advertise-address=${address}`,
      '--kubelet-preferred-address-types=InternalIP',
    ]);
    const apiServer = this.#apiServer;
    await waitFor(
      'the API server to be ready',
      async () => {
        if (!apiServer.running) throw new Error(`it ended with ${apiServer.fate}`);
        return (await this.kubectl(['get', '--raw', '/readyz'])).code === 0;
      },
      { timeoutMs: 90_000, intervalMs: 300, hint: () => apiServer.tail() },
    );
  }

  /** Ends the API server as a crash would: no watch is told of it. */
  async killApiServer(): Promise<void> {
    await this.#apiServer?.stop('SIGKILL');
  }

  /** kubectl as administrator, as a person would type it. */
  get kubectlCommand(): string[] {
    const config = `--kubeconfig=${this.kubeconfig('admin')}`;
    return ['nsenter', `--net=${this.#options.place.netns}`, '--', binary('kubectl'), config];
  }

  /** Runs kubectl as administrator. */
  kubectl(argv: readonly string[], input?: string): Promise<Finished> {
    return run([...this.kubectlCommand, ...argv], { timeoutMs: 120_000, ...(input === undefined ? {} : { input }) });
  }

  /** Runs kubectl, which must succeed. @returns its standard output */
  kubectlMust(argv: readonly string[], input?: string): Promise<string> {
    return must([...this.kubectlCommand, ...argv], {
      timeoutMs: 120_000,
      ...(input === undefined ? {} : { input }),
    });
  }

  /** All processes, for error messages. */
  get processes(): LabProcess[] {
    return [this.#etcd, this.#apiServer, ...this.#others].filter((process) => process !== undefined);
  }

  #token(user: string): string {
    let token = this.#tokens.get(user);
    if (token === undefined) {
      token = randomBytes(24).toString('hex');
      this.#tokens.set(user, token);
    }
    return token;
  }

  #start(name: string, args: readonly string[]): Promise<LabProcess> {
    const program = name === 'etcd' ? 'etcd' : binary(name);
    const log = join(this.#options.directory, 'logs', `${name}.log`);
    return LabProcess.start(name, this.#options.place, [program, ...args], { log });
  }
}
