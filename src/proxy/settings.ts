/** What the proxy can be told: its environment, read and checked in this one place. */
import { isIP } from 'node:net';
import { availableParallelism } from 'node:os';
import { parseDuration } from '../mesh/duration.js';
import { fallbackOf, type VariableName } from './variables.js';

/** A control plane endpoint. */
export interface Endpoint {
  /** DNS name or address without brackets. */
  readonly host: string;
  readonly port: number;
}

/** How to reach one of the two control plane services. */
export interface ControlPlaneSettings extends Endpoint {
  /** Path, PEM text or `SYSTEM`. */
  readonly rootCa: string;
  /** "" for none. */
  readonly altHostname: string;
  /** Path or literal. */
  readonly authToken: string;
  readonly clusterId: string;
  /** Further metadata of each call. */
  readonly headers: ReadonlyMap<string, string>;
}

export type AccessLogMode = 'off' | 'failures' | 'all';

export interface ProxySettings {
  readonly nodeName: string;
  readonly xds: ControlPlaneSettings;
  readonly ca: ControlPlaneSettings;
  readonly inpodUds: string;
  readonly clusterId: string;
  readonly clusterDomain: string;
  readonly network: string;
  readonly trustDomain: string;
  readonly secretTtlSeconds: number;
  readonly podName: string;
  readonly podNamespace: string;
  readonly instanceIp: string;
  /** Node metadata from ISTIO_META_* and ISTIO_METAJSON_*: JSON values. */
  readonly metadata: ReadonlyMap<string, unknown>;
  readonly workers: number;
  readonly streamWindow: number;
  readonly connectionWindow: number;
  readonly frameSize: number;
  readonly maxStreamsPerConnection: number;
  readonly poolIdleMs: number;
  readonly drainMs: number;
  readonly accessLog: AccessLogMode;
  /** 0 lets the kernel choose. */
  readonly ports: { readonly admin: number; readonly metrics: number; readonly readiness: number };
}

type Environment = Readonly<Record<string, string | undefined>>;

/**
 * Reads the environment.
 * @throws Error with one line for every variable that cannot be used
 */
export function readSettings(env: Environment): ProxySettings {
  const reader = new Reader(env);
  const controlPlane = 'KUBERNETES_SERVICE_HOST' in env ? 'istiod.istio-system.svc:15012' : 'localhost:15012';
  const xdsAddress = env['XDS_ADDRESS'] ?? controlPlane;
  const clusterId = env['ISTIO_META_CLUSTER_ID'] || reader.text('CLUSTER_ID') || fallbackOf('CLUSTER_ID');
  const authToken = reader.text('AUTH_TOKEN');
  const endpoint = (kind: 'XDS' | 'CA', address: string): ControlPlaneSettings => ({
    ...reader.parse(`${kind}_ADDRESS`, address, parseEndpoint, { host: '', port: 0 }),
    rootCa: reader.text(`${kind}_ROOT_CA`),
    altHostname: reader.text(`ALT_${kind}_HOSTNAME`),
    authToken,
    clusterId,
    headers: new Map([...reader.prefixed(`${kind}_HEADER_`)].map(([name, value]) => [name.toLowerCase(), value])),
  });
  const settings: ProxySettings = {
    nodeName: reader.required('NODE_NAME', 'the name of this node, as the controller knows it'),
    xds: endpoint('XDS', xdsAddress),
    ca: endpoint('CA', env['CA_ADDRESS'] ?? xdsAddress),
    inpodUds: reader.text('INPOD_UDS'),
    clusterId,
    clusterDomain: reader.text('CLUSTER_DOMAIN'),
    network: reader.text('NETWORK'),
    trustDomain: reader.text('TRUST_DOMAIN'),
    secretTtlSeconds: Math.max(1, Math.floor(reader.duration('SECRET_TTL') / 1000)),
    podName: reader.text('POD_NAME'),
    podNamespace: reader.text('POD_NAMESPACE'),
    instanceIp: reader.text('INSTANCE_IP'),
    metadata: reader.metadata(),
    workers: reader.parse(
      'ZTUNNEL_WORKER_THREADS',
      reader.text('ZTUNNEL_WORKER_THREADS'),
      (text) => parseWorkers(text, availableParallelism()),
      1,
    ),
    streamWindow: reader.integer('HTTP2_STREAM_WINDOW_SIZE', 65_535, 2 ** 31 - 1),
    connectionWindow: reader.integer('HTTP2_CONNECTION_WINDOW_SIZE', 65_535, 2 ** 31 - 1),
    frameSize: reader.integer('HTTP2_FRAME_SIZE', 16_384, 2 ** 24 - 1),
    maxStreamsPerConnection: reader.integer('POOL_MAX_STREAMS_PER_CONNECTION', 1, 65_535),
    poolIdleMs: reader.duration('POOL_UNUSED_RELEASE_TIMEOUT'),
    drainMs: reader.drain(),
    accessLog: reader.parse('EBBTIDE_ACCESS_LOG', reader.text('EBBTIDE_ACCESS_LOG'), parseAccessLog, 'all'),
    ports: {
      admin: reader.integer('EBBTIDE_ADMIN_PORT', 0, 65_535),
      metrics: reader.integer('EBBTIDE_METRICS_PORT', 0, 65_535),
      readiness: reader.integer('EBBTIDE_READINESS_PORT', 0, 65_535),
    },
  };
  reader.finish();
  return settings;
}

/** Reads variables and gathers what is wrong with them, so that all of it is told at once. */
class Reader {
  readonly #env: Environment;
  readonly #problems: string[] = [];

  constructor(env: Environment) {
    this.#env = env;
  }

  /** The variable, or its default. An empty value is a value. */
  text(name: VariableName): string {
    return this.#env[name] ?? fallbackOf(name);
  }

  required(name: VariableName, meaning: string): string {
    const value = this.text(name);
    if (value === '') this.#problems.push(`${name} is not set: it must be ${meaning}`);
    return value;
  }

  parse<T>(name: VariableName, text: string, parser: (text: string) => T, instead: T): T {
    try {
      return parser(text);
    } catch (error) {
      this.#problems.push(`${name}=${JSON.stringify(text.slice(0, 200))}: ${(error as Error).message}`);
      return instead;
    }
  }

  integer(name: VariableName, low: number, high: number): number {
    return this.parse(
      name,
      this.text(name),
      (text) => {
        const value = /^\d{1,10}$/.test(text) ? Number(text) : Number.NaN;
        if (!(value >= low && value <= high)) throw new Error(`expected a whole number from ${low} to ${high}`);
        return value;
      },
      low,
    );
  }

  duration(name: VariableName): number {
    return this.parse(name, this.text(name), parseDuration, 1000);
  }

  /** ztunnel's rule for how long to drain, in milliseconds. */
  drain(): number {
    const deadline = this.text('CONNECTION_TERMINATION_DEADLINE');
    if (deadline !== '') return this.duration('CONNECTION_TERMINATION_DEADLINE');
    if (this.text('TERMINATION_GRACE_PERIOD_SECONDS') === '') return 5000;
    const grace = this.integer('TERMINATION_GRACE_PERIOD_SECONDS', 0, 86_400);
    return Math.max(1, grace > 10 ? grace - 5 : grace - 1) * 1000;
  }

  /** Variables whose names begin so, by the rest of their names. */
  *prefixed(prefix: 'XDS_HEADER_' | 'CA_HEADER_' | 'ISTIO_META_' | 'ISTIO_METAJSON_'): Iterable<[string, string]> {
    for (const [name, value] of Object.entries(this.#env)) {
      if (name.startsWith(prefix) && name.length > prefix.length && value !== undefined) {
        yield [name.slice(prefix.length), value];
      }
    }
  }

  metadata(): Map<string, unknown> {
    const metadata = new Map<string, unknown>(this.prefixed('ISTIO_META_'));
    for (const [name, text] of this.prefixed('ISTIO_METAJSON_')) {
      const value = this.parse('ISTIO_METAJSON_*', text, (json) => JSON.parse(json) as unknown, undefined);
      if (value !== undefined) metadata.set(name, value);
    }
    return metadata;
  }

  finish(): void {
    if (this.#problems.length > 0) {
      throw new Error(`the environment cannot be used:\n  ${this.#problems.join('\n  ')}\nSee ebbtide proxy --help.`);
    }
  }
}

/** Parses `host:port`, `[::1]:port`, each with `https://` before it or not. The port may be left out: 15012. */
export function parseEndpoint(text: string): Endpoint {
  if (/^http:/i.test(text)) throw new Error('the control plane is reached by TLS only: use https://HOST:PORT');
  const match = /^(?:https:\/\/)?(?:\[([0-9a-fA-F:.]+)\]|([^/:[\]\s]+))(?::(\d{1,5}))?\/?$/.exec(text);
  const host = match?.[1] ?? match?.[2] ?? '';
  const port = Number(match?.[3] ?? 15012);
  if (host === '' || port < 1 || port > 65_535 || (match?.[1] !== undefined && isIP(host) !== 6)) {
    throw new Error('expected HOST:PORT or https://HOST:PORT, such as 10.0.0.1:15012 or [::1]:15012');
  }
  return { host, port };
}

/** Parses ZTUNNEL_WORKER_THREADS. @param processors what 0 and percentages refer to */
export function parseWorkers(text: string, processors: number): number {
  const match = /^(\d{1,4})(%?)$/.exec(text);
  if (match === null) throw new Error('expected a number, a percentage such as 50%, or 0 for one a processor');
  const number = Number(match[1]);
  if (match[2] === '%') return Math.max(1, Math.ceil((processors * Math.min(number, 100)) / 100));
  if (number > 256) throw new Error('expected at most 256 threads');
  return number === 0 ? processors : number;
}

function parseAccessLog(text: string): AccessLogMode {
  if (text === 'off' || text === 'failures' || text === 'all') return text;
  throw new Error('expected all, failures or off');
}
