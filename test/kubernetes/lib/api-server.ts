/** A real etcd and kube-apiserver on loopback, for tests: free ports, data in a temporary folder, ended by their ids. */
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { closeSync, existsSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Api, openApi } from '../../../src/mesh/api/index.js';
import { apiServerFlags, etcdCommand, writeKubeconfig } from './api-commands.js';

/** Ready in a few seconds; slow where the machine is loaded. */
const READY_MS = 120_000;
const STOP_MS = 15_000;

/** Folder of the cluster's programs, built when they are missing (minutes, the first time). */
export function clusterBinaries(): string {
  const script = join(import.meta.dirname, '..', 'binaries.sh');
  return execFileSync('bash', [script], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] }).trim();
}

/** A port that nobody listens on now. */
export function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const address = server.address();
      server.close(() => resolve(typeof address === 'object' && address !== null ? address.port : 0));
    });
  });
}

export interface ApiServerOptions {
  /** Further flags of kube-apiserver. */
  readonly flags?: readonly string[];
  /** Address that is listened on; the port is a free one. */
  readonly bindAddress?: string;
  /** Further static users: token to `user` and groups. */
  readonly users?: readonly { readonly token: string; readonly user: string; readonly groups?: readonly string[] }[];
}

/** One started program. */
class Program {
  readonly child: ChildProcess;
  readonly #log: string;
  readonly #ended: Promise<void>;

  constructor(program: string, args: readonly string[], log: string) {
    const fd = openSync(log, 'a');
    this.child = spawn(program, args, { stdio: ['ignore', fd, fd] });
    closeSync(fd);
    this.#log = log;
    this.#ended = new Promise((resolve) => {
      this.child.once('exit', () => resolve());
      this.child.once('error', () => resolve());
    });
    running.add(this.child);
    void this.#ended.then(() => running.delete(this.child));
  }

  get running(): boolean {
    return this.child.pid !== undefined && this.child.exitCode === null && this.child.signalCode === null;
  }

  tail(): string {
    return readFileSync(this.#log, 'utf8').trimEnd().split('\n').slice(-15).join('\n');
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (!this.running) return;
    this.child.kill(signal);
    const timer = setTimeout(() => this.child.kill('SIGKILL'), STOP_MS);
    await this.#ended;
    clearTimeout(timer);
  }
}

const running = new Set<ChildProcess>();
// A test that fails in the middle, or ^C, must not leave programs behind.
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** Starts both and waits until the API is ready. */
export async function startApiServer(options: ApiServerOptions = {}): Promise<ApiServer> {
  const binaries = clusterBinaries();
  if (spawnSync('etcd', ['--version']).status !== 0) {
    throw new Error('etcd is missing: install it without starting it (Debian: etcd-server)');
  }
  const directory = mkdtempSync(join(tmpdir(), 'ebbtide-api-'));
  const server = new ApiServer(binaries, directory, options);
  try {
    await server.prepare();
    return server;
  } catch (error) {
    await server.close();
    throw error;
  }
}

export class ApiServer {
  readonly directory: string;
  readonly binaries: string;
  readonly adminToken: string = randomBytes(16).toString('hex');
  readonly #options: ApiServerOptions;
  #port = 0;
  #etcdPort = 0;
  #etcd: Program | undefined;
  #server: Program | undefined;
  #api: Api | undefined;

  constructor(binaries: string, directory: string, options: ApiServerOptions) {
    this.binaries = binaries;
    this.directory = directory;
    this.#options = options;
  }

  get #host(): string {
    return this.#options.bindAddress ?? '127.0.0.1';
  }

  get port(): number {
    return this.#port;
  }

  /** `https://127.0.0.1:PORT` */
  get url(): string {
    return `https://${this.#host}:${this.#port}`;
  }

  get etcdUrl(): string {
    return `http://127.0.0.1:${this.#etcdPort}`;
  }

  /** PEM of the CA that signed the server's certificate. */
  get ca(): string {
    const certificates = readFileSync(join(this.directory, 'certs', 'apiserver.crt'), 'utf8').match(
      /-----BEGIN CERTIFICATE-----[\s\S]+?-----END CERTIFICATE-----/g,
    );
    return `${certificates?.at(-1)}\n`;
  }

  /** The API as its administrator (system:masters). */
  get api(): Api {
    this.#api ??= openApi({ kubeconfig: this.kubeconfig() });
    return this.#api;
  }

  async prepare(): Promise<void> {
    const at = (name: string): string => join(this.directory, name);
    mkdirSync(at('certs'));
    const { privateKey, publicKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
    writeFileSync(at('sa.key'), privateKey.export({ type: 'pkcs8', format: 'pem' }), { mode: 0o600 });
    writeFileSync(at('sa.pub'), publicKey.export({ type: 'spki', format: 'pem' }));
    const users = [
      { token: this.adminToken, user: 'admin', groups: ['system:masters'] },
      ...(this.#options.users ?? []),
    ];
    const lines = users.map(({ token, user, groups = [] }) => `${token},${user},${user},"${groups.join(',')}"\n`);
    writeFileSync(at('tokens.csv'), lines.join(''), { mode: 0o600 });
    this.#etcdPort = await freePort();
    const peerPort = await freePort();
    this.#port = await freePort();
    const [etcd = '', ...flags] = etcdCommand({
      data: at('etcd'),
      clientUrl: this.etcdUrl,
      peerUrl: `http://127.0.0.1:${peerPort}`,
    });
    this.#etcd = new Program(etcd, flags, at('etcd.log'));
    await this.startServer();
  }

  /** Starts kube-apiserver, again after {@link stopServer}: same port, same certificate, same data. */
  async startServer(flags: readonly string[] = this.#options.flags ?? []): Promise<void> {
    const at = (name: string): string => join(this.directory, name);
    const program = join(this.binaries, 'kube-apiserver');
    this.#server = new Program(
      program,
      [
        ...apiServerFlags({
          etcdUrl: this.etcdUrl,
          tokenKeys: { check: at('sa.pub'), sign: at('sa.key') },
          users: at('tokens.csv'),
          serviceRanges: '10.96.0.0/16',
          address: this.#host,
          port: this.#port,
        }),
        '--endpoint-reconciler-type=none',
        '--shutdown-delay-duration=0s',
        `--cert-dir=${at('certs')}`,
        ...flags,
      ],
      at('apiserver.log'),
    );
    const deadline = performance.now() + READY_MS;
    let last: unknown;
    while (performance.now() < deadline) {
      if (!this.#server.running) throw new Error(`kube-apiserver ended:\n${this.#server.tail()}`);
      if (this.#etcd?.running !== true) throw new Error(`etcd ended:\n${this.#etcd?.tail()}`);
      try {
        if (existsSync(at('certs/apiserver.crt'))) {
          // JSON, unlike /readyz; the namespace is made by the server itself.
          await this.api.request('GET', '/api/v1/namespaces/default', { timeoutMs: 5000 });
          return;
        }
      } catch (error) {
        last = error;
      }
      await sleep(100);
    }
    throw new Error(`kube-apiserver is not ready: ${String(last)}\n${this.#server.tail()}`);
  }

  /** Stops kube-apiserver; etcd and its data stay. */
  async stopServer(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    await this.#server?.stop(signal);
  }

  /** Forgets all old versions of all objects, as etcd does after minutes. */
  async compact(): Promise<void> {
    const post = async (path: string, body: object): Promise<{ header?: { revision?: string } }> => {
      const response = await fetch(`${this.etcdUrl}${path}`, { method: 'POST', body: JSON.stringify(body) });
      if (!response.ok) throw new Error(`etcd ${path}: ${response.status} ${await response.text()}`);
      return (await response.json()) as { header?: { revision?: string } };
    };
    const { header } = await post('/v3/kv/range', { key: Buffer.from('x').toString('base64') });
    await post('/v3/kv/compaction', { revision: header?.revision, physical: true });
  }

  /**
   * Writes a kubeconfig. @returns its path
   * @param token of whom; the administrator's by default
   * @param server another address of the same server: a relay
   */
  kubeconfig(token: string = this.adminToken, server: string = this.url): string {
    const path = join(this.directory, `kubeconfig-${randomBytes(4).toString('hex')}`);
    writeKubeconfig(path, { server, ca: this.ca, token });
    return path;
  }

  /** A folder as Kubernetes mounts it into pods (`token`, `ca.crt`, `namespace`). @returns its path */
  serviceAccountDirectory(token: string, namespace: string): string {
    const path = mkdtempSync(join(this.directory, 'sa-'));
    writeFileSync(join(path, 'token'), token, { mode: 0o600 });
    writeFileSync(join(path, 'ca.crt'), this.ca);
    writeFileSync(join(path, 'namespace'), namespace);
    return path;
  }

  /**
   * A token of a service account, by TokenRequest.
   * @param seconds lifetime; servers refuse less than 600
   */
  async token(
    namespace: string,
    serviceAccount: string,
    options: {
      readonly audiences?: readonly string[];
      readonly seconds?: number;
      readonly pod?: { readonly name: string; readonly uid: string };
    } = {},
  ): Promise<string> {
    const { audiences, seconds = 3600, pod } = options;
    const spec: Record<string, unknown> = { expirationSeconds: seconds };
    if (audiences !== undefined) spec['audiences'] = audiences;
    if (pod !== undefined) spec['boundObjectRef'] = { kind: 'Pod', apiVersion: 'v1', ...pod };
    const path = `/api/v1/namespaces/${namespace}/serviceaccounts/${serviceAccount}/token`;
    const answer = await this.api.request<{ status: { token: string } }>('POST', path, { body: { spec } });
    return answer.status.token;
  }

  /** Ends both and removes everything. */
  async close(): Promise<void> {
    this.#api?.close();
    await this.#server?.stop();
    await this.#etcd?.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }
}
