/** Prometheus metrics: Istio's traffic series from the engine's counters, and the proxy's own. Loaded at the first scrape. */
import { readdirSync, readFileSync } from 'node:fs';
import { Counter, type CounterConfiguration, Gauge, Registry } from 'prom-client';
import type { TrafficSample } from '../engine.js';
import type { MetricSources } from './sources.js';

interface Value {
  readonly value: number;
  readonly labels: Record<string, string | number>;
}

type TrafficFigure = 'opened' | 'closed' | 'failed' | 'receivedBytes' | 'sentBytes';

const TRAFFIC: readonly (readonly [string, TrafficFigure, string])[] = [
  ['istio_tcp_connections_opened_total', 'opened', 'TCP connections opened'],
  ['istio_tcp_connections_closed_total', 'closed', 'TCP connections closed'],
  ['istio_tcp_connections_failed_total', 'failed', 'TCP connections refused or failed, by response_flags'],
  ['istio_tcp_received_bytes_total', 'receivedBytes', 'Bytes from the client side'],
  ['istio_tcp_sent_bytes_total', 'sentBytes', 'Bytes to the client side'],
];

/** A counter whose values are somebody else's: nothing is kept between scrapes. */
class ReadCounter extends Counter {
  readonly #config: CounterConfiguration<string>;
  readonly #read: () => Value[];

  constructor(config: CounterConfiguration<string>, read: () => Value[]) {
    super(config);
    this.#config = config;
    this.#read = read;
  }

  override async get(): ReturnType<Counter['get']> {
    const { name, help } = this.#config;
    const shape = await super.get();
    return { ...shape, name, help, values: this.#read() };
  }
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #sources: MetricSources;
  #traffic: TrafficSample[] = [];

  constructor(sources: MetricSources) {
    this.#sources = sources;
    this.#addTraffic();
    this.#addEngine();
    this.#addPods();
    this.#addControlPlane();
    this.#addProcess();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  /** The page. The engine's series are read once for it. */
  async render(): Promise<string> {
    this.#traffic = this.#sources.engine.traffic();
    try {
      return await this.#registry.metrics();
    } finally {
      this.#traffic = [];
    }
  }

  #counter(name: string, help: string, read: () => number | Value[], labelNames: readonly string[] = []): void {
    const config = { name, help, labelNames: [...labelNames], registers: [this.#registry] };
    new ReadCounter(config, () => {
      const value = read();
      return typeof value === 'number' ? [{ value, labels: {} }] : value;
    });
  }

  #gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      name,
      help,
      registers: [this.#registry],
      collect() {
        this.set(read());
      },
    });
  }

  #addTraffic(): void {
    const names = this.#sources.trafficLabelNames;
    for (const [name, figure, help] of TRAFFIC) {
      this.#counter(
        name,
        help,
        () =>
          this.#traffic
            .filter((sample) => figure !== 'failed' || sample.failed > 0)
            .map((sample) => ({
              value: sample[figure],
              labels: Object.fromEntries(names.map((label, index) => [label, sample.labels[index] ?? 'unknown'])),
            })),
        names,
      );
    }
    this.#addSockets();
  }

  /** Connections that are open, of all series of a reporter: what was opened and not closed. */
  #addSockets(): void {
    const reporter = this.#sources.trafficLabelNames.indexOf('reporter');
    const open = new Gauge({
      name: 'istio_tcp_sockets_open',
      help: 'TCP connections that are open',
      labelNames: ['reporter'],
      registers: [this.#registry],
      collect: () => {
        const counts = { source: 0, destination: 0 };
        for (const sample of this.#traffic) {
          const side = sample.labels[reporter];
          if (side === 'source' || side === 'destination') counts[side] += sample.opened - sample.closed;
        }
        // The two counters of a series are read one after the other, while connections close.
        for (const side of ['source', 'destination'] as const) open.set({ reporter: side }, Math.max(0, counts[side]));
      },
    });
  }

  #addEngine(): void {
    const { engine, accessLog, logStream } = this.#sources;
    const stats = engine.stats.bind(engine);
    this.#gauge('ebbtide_open_connections', 'Connections of applications', () => stats().openConnections);
    this.#gauge('ebbtide_hbone_connections', 'HBONE connections, both directions', () => stats().hboneConnections);
    this.#gauge('ebbtide_buffered_bytes', 'Bytes held in buffers of the engine', () => stats().bufferedBytes);
    this.#counter('ebbtide_tls_handshakes_total', 'TLS handshakes completed', () => stats().handshakes);
    this.#counter('ebbtide_tls_handshake_failures_total', 'TLS handshakes failed', () => stats().handshakeFailures);
    this.#counter(
      'ebbtide_engine_faults_total',
      'Failures inside the engine, each of which ended one connection or one attempt of a task',
      () => stats().faults,
    );
    this.#counter(
      'ebbtide_access_records_dropped_total',
      'Connections without access log line: they ended faster than lines could be made',
      () => stats().accessRecordsDropped,
    );
    this.#counter(
      'ebbtide_log_lines_dropped_total',
      'Log lines dropped because nobody read them',
      () => logStream?.dropped ?? 0,
    );
    this.#counter(
      'ebbtide_connections_refused_total',
      'Connections refused, failed or cut, by reason',
      () =>
        [...accessLog.refusals].map(({ reason, direction, count }) => ({
          value: count,
          labels: { reason, direction },
        })),
      ['reason', 'direction'],
    );
  }

  #addPods(): void {
    const { pods, certificates } = this.#sources;
    this.#gauge('workload_manager_active_proxy_count', 'Pods with open listeners', () => pods.active);
    this.#gauge(
      'workload_manager_pending_proxy_count',
      'Pods whose listeners could not be opened yet',
      () => pods.pending.length,
    );
    this.#counter('workload_manager_proxies_started_total', 'Pods started', () => pods.counters.started);
    this.#counter('workload_manager_proxies_stopped_total', 'Pods stopped', () => pods.counters.stopped);
    this.#counter('ebbtide_certificates_fetched_total', 'Certificates received', () => certificates.counters.fetched);
    this.#counter(
      'ebbtide_certificate_failures_total',
      'Certificate requests that failed',
      () => certificates.counters.failed,
    );
    const expiry = new Gauge({
      name: 'ebbtide_certificate_not_after_seconds',
      help: 'End of the certificate of an identity, seconds since the epoch; 0 where there is none',
      labelNames: ['identity'],
      registers: [this.#registry],
      collect() {
        expiry.reset();
        for (const { identity, certificate } of certificates.list()) {
          expiry.set({ identity }, Math.floor((certificate?.notAfterMs ?? 0) / 1000));
        }
      },
    });
  }

  #addControlPlane(): void {
    const { xds, version, clock } = this.#sources;
    const byUrl = (figures: Readonly<Record<string, number>>): Value[] =>
      Object.entries(figures).map(([url, value]) => ({ value, labels: { url } }));
    this.#counter(
      'istio_xds_connection_terminations_total',
      'xDS streams that ended, by reason',
      () => Object.entries(xds.counters.terminations).map(([reason, value]) => ({ value, labels: { reason } })),
      ['reason'],
    );
    this.#counter('istio_xds_message_total', 'xDS responses', () => byUrl(xds.counters.messages), ['url']);
    this.#counter('istio_xds_message_bytes_total', 'Bytes of xDS responses', () => byUrl(xds.counters.messageBytes), [
      'url',
    ]);
    this.#counter(
      'ebbtide_xds_rejected_resources_total',
      'xDS resources that could not be used',
      () => xds.counters.rejectedResources,
    );
    this.#gauge(
      'ebbtide_clock_skew_seconds',
      'How far the clock is behind that of the control plane (negative: ahead), 0 below 5 s',
      () => clock.skewMs / 1000,
    );
    this.#gauge('ebbtide_xds_connected', '1 while the controller is connected', () => Number(xds.connected));
    const build = new Gauge({
      name: 'istio_build',
      help: 'Version of this program',
      labelNames: ['component', 'tag'],
      registers: [this.#registry],
    });
    build.set({ component: 'ztunnel', tag: version }, 1);
  }

  #addProcess(): void {
    this.#gauge('process_open_fds', 'Open descriptors', () => readdirSync('/proc/self/fd').length);
    this.#gauge('process_max_fds', 'Highest number of descriptors', () => {
      const limits = readFileSync('/proc/self/limits', 'utf8');
      return Number(/^Max open files\s+(\d+)/m.exec(limits)?.[1] ?? 0);
    });
    this.#gauge('process_resident_memory_bytes', 'Resident memory', () => process.memoryUsage.rss());
    this.#counter('process_cpu_seconds_total', 'Processor time, user and system', () => {
      const { user, system } = process.cpuUsage();
      return (user + system) / 1e6;
    });
    this.#gauge('process_start_time_seconds', 'Start, seconds since the epoch', () => performance.timeOrigin / 1000);
  }
}
