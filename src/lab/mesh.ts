/** The mesh's own processes in a lab: one controller, and an agent and a proxy for each node. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ADMIN_PORT, CONTROLLER_PORT, METRICS_PORT, READINESS_PORT } from '../mesh/ports.js';
import { type Finished, must, run } from './exec.js';
import type { Ground } from './ground.js';
import { CONTROL_ADDRESS } from './network.js';
import { LabProcess, type Place, placed } from './process.js';
import { Hopeless, patient, waitFor } from './wait.js';

/** The `ebbtide` command as built; this file runs from src/ and from dist/, both beside it. */
export const EBBTIDE = fileURLToPath(new URL('../../dist/main.js', import.meta.url));

export interface MeshOptions {
  /** Further arguments of the controller. */
  readonly controllerArguments?: readonly string[];
  /** Added to the environment of the proxies. */
  readonly proxyEnv?: NodeJS.ProcessEnv;
}

const GRACE_MS = patient(12_000);

/**
 * Environment by which a proxy, or the check, knows its controller.
 * @param address as https://HOST:PORT; @param roots and @param token are files
 */
export function controlPlaneEnv(address: string, roots: string, token: string): Record<string, string> {
  return { XDS_ADDRESS: address, CA_ADDRESS: address, XDS_ROOT_CA: roots, CA_ROOT_CA: roots, AUTH_TOKEN: token };
}

/** An access log line: ztunnel's field names, values as logged. */
export type AccessLine = Readonly<Record<string, string | number | undefined>>;

/** One node's agent and proxy, each of which can be started, killed and started again. */
export class MeshNode {
  readonly name: string;
  readonly place: Place;
  agent: LabProcess | undefined;
  proxy: LabProcess | undefined;
  readonly #ground: Ground;
  readonly #env: NodeJS.ProcessEnv;
  #ports = 0;

  constructor(ground: Ground, number: number, options: MeshOptions) {
    this.name = `node${number}`;
    this.#ground = ground;
    this.place = { netns: ground.netnsPath(this.name), cgroup: ground.subgroup(this.name) };
    this.#env = options.proxyEnv ?? {};
  }

  log(part: 'agent' | 'proxy'): string {
    return join(this.#ground.directory, 'logs', `${part}-${this.name}.log`);
  }

  /** Starts an agent. One that is there already is not touched, and is the caller's to end. */
  async startAgent(...flags: readonly string[]): Promise<void> {
    const argv = [process.execPath, EBBTIDE, 'agent', '--manifests', join(this.#ground.directory, 'manifests')];
    argv.push('--bpffs', join(this.#ground.bpffs, this.name), ...flags);
    this.agent = await LabProcess.start(`agent of ${this.name}`, this.place, argv, {
      log: this.log('agent'),
      env: { NODE_NAME: this.name, INPOD_UDS: this.#socket() },
    });
  }

  /**
   * Starts a proxy. One that is there already is not touched, and is the caller's to end.
   * @param first added to the number of each of its ports, so that two can be in one network namespace
   */
  async startProxy(first = 0, env: NodeJS.ProcessEnv = {}): Promise<void> {
    this.#ports = first;
    const data = join(this.#ground.directory, 'data');
    const controller = `https://${CONTROL_ADDRESS}:${CONTROLLER_PORT}`;
    this.proxy = await LabProcess.start(`proxy of ${this.name}`, this.place, [process.execPath, EBBTIDE, 'proxy'], {
      log: this.log('proxy'),
      env: {
        NODE_NAME: this.name,
        INPOD_UDS: this.#socket(),
        ...controlPlaneEnv(controller, join(data, 'root-cert.pem'), join(data, 'tokens', this.name)),
        ...(first === 0
          ? {}
          : {
              EBBTIDE_ADMIN_PORT: String(ADMIN_PORT + first),
              EBBTIDE_METRICS_PORT: String(METRICS_PORT + first),
              EBBTIDE_READINESS_PORT: String(READINESS_PORT + first),
            }),
        ...this.#env,
        ...env,
      },
    });
  }

  /** Goes back to a proxy that was started before. */
  useProxy(proxy: LabProcess | undefined, first: number): void {
    this.proxy = proxy;
    this.#ports = first;
  }

  /** Resolves when the proxy says that it is ready, which ends with an error if it stops first. */
  async ready(): Promise<void> {
    await waitFor(
      `the proxy of ${this.name} to be ready (port ${READINESS_PORT})`,
      async () => {
        this.#alive(this.proxy);
        this.#alive(this.agent);
        return (await this.fetch(READINESS_PORT, '/healthz/ready')).code === 0;
      },
      { hint: () => this.#logs() },
    );
  }

  /** Asks the proxy over HTTP, from within the node. `code` is curl's: 0 only for an answer of 2xx. */
  fetch(port: number, path: string): Promise<Finished> {
    const argv = [
      'curl',
      '-sS',
      '--fail',
      '--max-time',
      `${patient(5000) / 1000}`,
      `http://127.0.0.1:${port + this.#ports}${path}`,
    ];
    return run(placed(this.place, argv));
  }

  async metrics(): Promise<Metric[]> {
    const answer = await this.fetch(METRICS_PORT, '/metrics');
    if (answer.code !== 0) throw new Error(`no metrics from the proxy of ${this.name}: ${answer.stderr.trim()}`);
    return parseMetrics(answer.stdout);
  }

  async configDump(): Promise<Record<string, unknown>> {
    const answer = await this.fetch(ADMIN_PORT, '/config_dump');
    if (answer.code !== 0) throw new Error(`no config dump from the proxy of ${this.name}: ${answer.stderr.trim()}`);
    return JSON.parse(answer.stdout) as Record<string, unknown>;
  }

  /** The access log lines so far. */
  accessLog(): AccessLine[] {
    const lines: AccessLine[] = [];
    for (const text of readFileSync(this.log('proxy'), 'utf8').split('\n')) {
      if (!text.includes('"direction"')) continue;
      try {
        lines.push(JSON.parse(text) as AccessLine);
      } catch {
        // The last line may be half written.
      }
    }
    return lines;
  }

  /** Stops the proxy, then the agent; true when both ended by themselves with exit code 0. */
  async stop(): Promise<boolean> {
    let clean = true;
    for (const process of [this.proxy, this.agent]) {
      if (process === undefined) continue;
      const inTime = await process.stop('SIGTERM', GRACE_MS);
      clean &&= inTime && process.exitCode === 0;
    }
    return clean;
  }

  /** Removes the agent's programs, links, maps and pins from the kernel, as `ebbtide uninstall` does it. */
  async uninstall(): Promise<void> {
    await must(
      placed(this.place, [process.execPath, EBBTIDE, 'uninstall', '--bpffs', join(this.#ground.bpffs, this.name)]),
    );
  }

  #socket(): string {
    return join(this.#ground.directory, `${this.name}.sock`);
  }

  #alive(process: LabProcess | undefined): void {
    if (process !== undefined && !process.running) throw new Hopeless(`${process.name} ended: ${process.fate}`);
  }

  #logs(): string {
    const parts = [this.agent, this.proxy].filter((process) => process !== undefined);
    return parts
      .map((process) => `--- ${process.name} (${process.fate}), ${process.log}:\n${process.tail()}`)
      .join('\n');
  }
}

/** The controller, on the lab's control network. */
export async function startController(ground: Ground, options: MeshOptions): Promise<LabProcess> {
  const data = join(ground.directory, 'data');
  const place = { netns: ground.netnsPath('control'), cgroup: ground.subgroup('control') };
  const argv = [process.execPath, EBBTIDE, 'controller', '--manifests', join(ground.directory, 'manifests')];
  argv.push(
    '--data',
    data,
    '--listen',
    `${CONTROL_ADDRESS}:${CONTROLLER_PORT}`,
    ...(options.controllerArguments ?? []),
  );
  const controller = await LabProcess.start('controller', place, argv, {
    log: join(ground.directory, 'logs', 'controller.log'),
  });
  await waitFor(
    'the controller to write its root certificate and the tokens of the nodes, and to listen',
    async () => {
      if (!controller.running) throw new Hopeless(`the controller ended: ${controller.fate}`);
      if (!existsSync(join(data, 'root-cert.pem')) || !existsSync(join(data, 'tokens', 'node2'))) return false;
      const sockets = await must(['nsenter', `--net=${place.netns}`, 'ss', '-Hltn', `sport = :${CONTROLLER_PORT}`]);
      return sockets !== '';
    },
    { hint: () => controller.tail() },
  );
  return controller;
}

/** One sample of a metrics page. */
export interface Metric {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

/** Parses the Prometheus text format, as far as the proxy writes it. */
export function parseMetrics(text: string): Metric[] {
  const metrics: Metric[] = [];
  for (const line of text.split('\n')) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (match === null) continue;
    const labels: Record<string, string> = {};
    for (const [, name = '', value = ''] of (match[2] ?? '').matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g))
      labels[name] = value;
    metrics.push({ name: match[1] ?? '', labels, value: Number(match[3]) });
  }
  return metrics;
}

/** The sum of the samples with this name and these labels. */
export function sumMetrics(metrics: readonly Metric[], name: string, labels: Readonly<Record<string, string>>): number {
  return metrics
    .filter(
      (metric) => metric.name === name && Object.entries(labels).every(([key, value]) => metric.labels[key] === value),
    )
    .reduce((sum, metric) => sum + metric.value, 0);
}
