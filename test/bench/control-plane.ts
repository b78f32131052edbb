/**
 * The controller of a large cluster: a Kubernetes API that is made up, proxies that only listen, the real controller in
 * between. Memory and processor of the controller, the time from a write of the API until every node has it, bytes.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

export interface ControlPlaneOptions {
  readonly nodes: number;
  readonly pods: number;
  /** Changes of pods a second, in the busy part. */
  readonly changesPerSecond: number;
  readonly seconds: number;
  progress(text: string): void;
}

/** What a client process reports. */
interface ClientReport {
  readonly bytes: number;
  readonly responses: number;
  readonly failed: number;
  readonly latencies: readonly number[];
  readonly last: readonly (readonly [number, number])[];
}

const HERE = import.meta.dirname;
/** As the Deployment has them: a young generation that grows would be half of the controller's memory. */
const NODE_FLAGS = ['--max-semi-space-size=4'];
/** Also as there: what is large goes back to the system when it is freed, or was never used, instead of splitting the one heap. */
const MALLOC = { MALLOC_MMAP_THRESHOLD_: '65536', MALLOC_TRIM_THRESHOLD_: '131072', MALLOC_ARENA_MAX: '1' };
const CLIENT_PROCESSES = 2;
const START_MS = 300_000;
const TICKS_PER_SECOND = 100;

/** A started process whose answers are lines. */
class Talker {
  readonly child: ChildProcess;
  readonly #lines: string[] = [];
  #wake: (() => void) | undefined;

  constructor(argv: readonly string[], environment: NodeJS.ProcessEnv = {}) {
    this.child = spawn(process.execPath, argv, {
      stdio: ['pipe', 'pipe', 'inherit'],
      env: { ...process.env, ...environment },
    });
    if (this.child.stdout !== null) {
      createInterface(this.child.stdout).on('line', (line) => {
        this.#lines.push(line);
        this.#wake?.();
      });
    }
    this.child.on('exit', () => this.#wake?.());
  }

  /** The next line that fits. */
  async line(fits: (line: string) => boolean = () => true): Promise<string> {
    for (;;) {
      for (let line = this.#lines.shift(); line !== undefined; line = this.#lines.shift()) if (fits(line)) return line;
      if (this.child.exitCode !== null) throw new Error(`a process of the benchmark ended with ${this.child.exitCode}`);
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  say(text: string): void {
    this.child.stdin?.write(`${text}\n`);
  }

  async ask<T>(text: string): Promise<T> {
    this.say(text);
    return JSON.parse(await this.line()) as T;
  }

  async stop(): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return;
    const ended = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.kill('SIGTERM');
    const timer = setTimeout(() => this.child.kill('SIGKILL'), 5000);
    await ended;
    clearTimeout(timer);
  }
}

/** Runs it once. @returns figures by name */
export async function controlPlane(options: ControlPlaneOptions): Promise<Record<string, number>> {
  const directory = mkdtempSync(join(tmpdir(), 'ebbtide-bench-'));
  const talkers: Talker[] = [];
  // Also where the benchmark is interrupted: nothing of it stays.
  const clean = (): void => {
    for (const { child } of talkers) child.kill('SIGKILL');
    rmSync(directory, { recursive: true, force: true });
  };
  process.once('exit', clean);
  const started = <T extends Talker>(talker: T): T => {
    talkers.push(talker);
    return talker;
  };
  try {
    return await measure(options, directory, started);
  } finally {
    await Promise.all(talkers.map((talker) => talker.stop()));
    process.removeListener('exit', clean);
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The figures as text, and how they stand to what is promised of a large cluster. */
export function renderControlPlane(figures: Readonly<Record<string, number>>, nodes: number, pods: number): string {
  const lines = [`control plane: ${nodes} nodes, ${pods} pods`];
  for (const [name, value] of Object.entries(figures))
    lines.push(`${name.padEnd(34)}${value.toPrecision(4).padStart(12)}`);
  const at = (name: string): number => figures[name] ?? Number.NaN;
  for (const [what, value, limit] of [
    ['memory with all nodes: at most 400 MB', at('rss_all_nodes_mb'), 400],
    ['a change to every node, p99: at most 500 ms', at('push_every_node_p99_ms'), 500],
    ['the same under 20 changes a second', at('busy_push_p99_ms'), 500],
    ['a policy, p99: at most 500 ms', at('policy_push_p99_ms'), 500],
    ['bytes per change and node: at most 500', at('bytes_per_pod_change_per_node'), 500],
  ] as const) {
    lines.push(`${value <= limit ? 'met    ' : 'NOT MET'}  ${what}  (${value.toPrecision(4)})`);
  }
  return lines.join('\n');
}

async function measure(
  { nodes, pods, changesPerSecond, seconds, progress }: ControlPlaneOptions,
  directory: string,
  started: (talker: Talker) => Talker,
): Promise<Record<string, number>> {
  const at = (name: string): string => join(directory, name);
  execFileSync(
    'openssl',
    [
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'],
      ...['-subj', '/CN=api', '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', at('key'), '-out', at('ca.crt')],
    ],
    { stdio: 'ignore' },
  );
  writeFileSync(at('token'), 'controller');
  writeFileSync(at('namespace'), 'istio-system');
  const api = started(
    new Talker([join(HERE, 'control-plane/fake-api.ts'), `${nodes}`, `${pods}`, at('ca.crt'), at('key')]),
  );
  const apiPort = await api.line();

  progress(`control plane: ${nodes} nodes, ${pods} pods; the controller reads them`);
  const begun = performance.now();
  const main = join(HERE, '../../dist/main.js');
  const controller = started(
    new Talker([...NODE_FLAGS, main, 'controller', '--service-account', directory, '--listen', '127.0.0.1:0'], {
      KUBERNETES_SERVICE_HOST: '127.0.0.1',
      KUBERNETES_SERVICE_PORT: apiPort,
      EBBTIDE_MANIFESTS: undefined,
      KUBECONFIG: undefined,
      POD_NAMESPACE: 'istio-system',
      ...MALLOC,
    }),
  );
  const listening = await controller.line((line) => line.includes('"event":"listening"'));
  const readMs = performance.now() - begun;
  const { port } = JSON.parse(listening) as { port: number };
  const pid = controller.child.pid ?? 0;
  const alone = residentMb(pid);
  const roots = await waitForRoots(apiPort, at('ca.crt'));
  writeFileSync(at('roots'), roots);

  progress('control plane: all proxies come at once, each to be told everything');
  const joined = performance.now();
  const share = Math.ceil(nodes / CLIENT_PROCESSES);
  const clients = Array.from({ length: CLIENT_PROCESSES }, (_, index) => {
    const count = Math.min(share, nodes - index * share);
    const program = join(HERE, 'control-plane/clients.ts');
    return started(new Talker([program, `${port}`, at('roots'), `${index * share}`, `${count}`]));
  });
  let wholeBytes = 0;
  let peak = alone;
  for (;;) {
    const states = await Promise.all(
      clients.map((client) => client.ask<{ ready: number; failed: number; wholeBytes: number }>('ready')),
    );
    const ready = states.reduce((sum, state) => sum + state.ready, 0);
    const failed = states.reduce((sum, state) => sum + state.failed, 0);
    wholeBytes = states.reduce((sum, state) => sum + state.wholeBytes, 0);
    peak = Math.max(peak, residentMb(pid));
    if (failed > 0) throw new Error(`${failed} proxies failed`);
    if (ready === nodes) break;
    if (performance.now() - joined > START_MS)
      throw new Error(`only ${ready} of ${nodes} proxies were told everything`);
    await sleep(500);
  }
  const joinMs = performance.now() - joined;
  await sleep(5000);
  const rest = residentMb(pid);
  let next = 0;
  const touch = (): void => api.say(`touch ${(next++ * 7919) % pods}`);

  progress('control plane: a change a second');
  await Promise.all(clients.map((client) => client.ask('reset')));
  for (let change = 0; change < 10; change++) {
    touch();
    await sleep(1000);
  }
  await sleep(2000);
  const calm = await report(clients);

  progress(`control plane: ${changesPerSecond} changes a second`);
  await Promise.all(clients.map((client) => client.ask('reset')));
  const before = cpuSeconds(pid);
  const from = performance.now();
  for (let change = 0; change < changesPerSecond * seconds; change++) {
    touch();
    const due = from + ((change + 1) * 1000) / changesPerSecond;
    if (due > performance.now()) await sleep(due - performance.now());
  }
  const cpu = (cpuSeconds(pid) - before) / ((performance.now() - from) / 1000);
  await sleep(3000);
  const busy = await report(clients);

  progress('control plane: a policy every three seconds');
  await Promise.all(clients.map((client) => client.ask('reset')));
  for (let change = 0; change < 5; change++) {
    api.say('policy');
    await sleep(3000);
  }
  const policies = await report(clients);
  peak = Math.max(peak, residentMb(pid), peakMb(pid));
  const all = (what: Merged, changes: number): void => {
    if (what.everywhere.length !== changes || what.clients !== changes * nodes) {
      throw new Error(`${what.clients} of ${changes * nodes} changes arrived`);
    }
  };
  all(calm, 10);
  all(busy, changesPerSecond * seconds);
  all(policies, 5);
  return {
    read_s: readMs / 1000,
    rss_alone_mb: alone,
    join_all_s: joinMs / 1000,
    whole_state_mb_per_node: wholeBytes / nodes / 1e6,
    rss_all_nodes_mb: rest,
    rss_peak_mb: peak,
    push_p50_ms: at50(calm.latencies),
    push_p99_ms: at99(calm.latencies),
    push_every_node_p99_ms: at99(calm.everywhere),
    busy_push_p50_ms: at50(busy.latencies),
    busy_push_p99_ms: at99(busy.latencies),
    busy_push_every_node_p99_ms: at99(busy.everywhere),
    busy_cpu_cores: cpu,
    bytes_per_pod_change_per_node: busy.bytes / (changesPerSecond * seconds * nodes),
    policy_push_p50_ms: at50(policies.latencies),
    policy_push_p99_ms: at99(policies.latencies),
  };
}

/** The controller publishes its root as every application would find it. */
async function waitForRoots(port: string, ca: string): Promise<string> {
  const built: string = '../../dist/mesh/api/index.js';
  const { openApi } = (await import(built)) as typeof import('../../src/mesh/api/index.js');
  const api = openApi({ server: `https://127.0.0.1:${port}`, serviceAccountDirectory: join(ca, '..') });
  for (let tries = 0; tries < 300; tries++) {
    try {
      const path = '/api/v1/namespaces/istio-system/configmaps/istio-ca-root-cert';
      const map = await api.request<{ data: Record<string, string> }>('GET', path);
      const bundle = map.data['root-cert.pem'];
      if (bundle !== undefined) return bundle;
    } catch {
      // Not published yet.
    }
    await sleep(200);
  }
  throw new Error('the controller does not publish its root');
}

interface Merged {
  readonly bytes: number;
  readonly clients: number;
  readonly latencies: readonly number[];
  /** Of each change: until the last node had it. */
  readonly everywhere: readonly number[];
}

async function report(clients: readonly Talker[]): Promise<Merged> {
  const reports = await Promise.all(clients.map((client) => client.ask<ClientReport>('report')));
  const everywhere: number[] = [];
  const length = Math.max(...reports.map(({ last }) => last.length));
  // Every process saw the same changes in the same order.
  for (let index = 0; index < length; index++)
    everywhere.push(Math.max(...reports.map(({ last }) => last[index]?.[0] ?? Number.NaN)));
  return {
    bytes: reports.reduce((sum, { bytes }) => sum + bytes, 0),
    clients: reports.reduce((sum, { last }) => sum + last.reduce((all, [, count]) => all + count, 0), 0),
    latencies: reports.flatMap(({ latencies }) => latencies).sort((a, b) => a - b),
    everywhere: everywhere.sort((a, b) => a - b),
  };
}

const at50 = (sorted: readonly number[]): number => sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
const at99 = (sorted: readonly number[]): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * 0.99))] ?? Number.NaN;

function statusMb(pid: number, field: string): number {
  const match = new RegExp(`^${field}:\\s+(\\d+) kB$`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
  return (Number(match?.[1] ?? 0) * 1024) / 1e6;
}
const residentMb = (pid: number): number => statusMb(pid, 'VmRSS');
const peakMb = (pid: number): number => statusMb(pid, 'VmHWM');

function cpuSeconds(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}
