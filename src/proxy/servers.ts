/** The proxy's three HTTP servers: admin (loopback), metrics and readiness. */

import { type HttpAnswer, type HttpListener, type HttpRoute, listenHttp } from '../mesh/http.js';
import type { Logger } from '../mesh/log.js';
import type { Metrics } from './telemetry/metrics.js';
import type { DumpSources, MetricSources } from './telemetry/sources.js';

export interface ServerOptions {
  readonly ports: { readonly admin: number; readonly metrics: number; readonly readiness: number };
  readonly log: Logger;
  readonly sources: MetricSources & DumpSources;
  /** What the proxy still waits for; empty when ready. */
  pending(): readonly string[];
  quit(): void;
}

export interface Servers {
  readonly ports: ServerOptions['ports'];
  close(): void;
}

const READ = ['GET', 'HEAD'];
const LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'];

/** Resolves once all three listen; where one cannot, none does. */
export async function startServers(options: ServerOptions): Promise<Servers> {
  const { log, ports } = options;
  const onError = (error: Error): void => log.error({ event: 'http_failed', err: error }, 'an HTTP request failed');
  const open: HttpListener[] = [];
  const listen = async (
    what: string,
    port: number,
    routes: [string, HttpRoute][],
    host?: string,
  ): Promise<HttpListener> => {
    const listener = await listenHttp({ what, port, routes: new Map(routes), onError, ...(host ? { host } : {}) });
    open.push(listener);
    return listener;
  };
  const close = (): void => {
    for (const listener of open) listener.close();
  };
  try {
    const metrics = metricsRoute(options.sources);
    const readiness: HttpRoute = { methods: READ, handle: () => readinessAnswer(options.pending()) };
    const adminPort = await listen('the admin interface', ports.admin, adminRoutes(options), '127.0.0.1');
    const metricsPort = await listen('metrics', ports.metrics, [
      ['/metrics', metrics],
      ['/stats/prometheus', metrics],
    ]);
    const readinessPort = await listen('readiness', ports.readiness, [['/healthz/ready', readiness]]);
    return { ports: { admin: adminPort.port, metrics: metricsPort.port, readiness: readinessPort.port }, close };
  } catch (error) {
    close();
    throw error;
  }
}

function readinessAnswer(pending: readonly string[]): HttpAnswer {
  if (pending.length === 0) return { status: 200, body: 'ready\n' };
  return { status: 500, body: `not ready, pending: ${pending.join(', ')}\n` };
}

function metricsRoute(sources: MetricSources): HttpRoute {
  let metrics: Metrics | undefined;
  return {
    methods: READ,
    handle: async () => {
      const module = await import('./telemetry/metrics.js');
      metrics ??= new module.Metrics(sources);
      return { status: 200, type: metrics.contentType, body: await metrics.render() };
    },
  };
}

function adminRoutes({ log, sources, quit }: ServerOptions): [string, HttpRoute][] {
  const initialLevel = log.level;
  const dump: HttpRoute = {
    methods: READ,
    handle: async () => {
      const { configDump } = await import('./telemetry/config-dump.js');
      return { status: 200, type: 'application/json', body: configDump(sources) };
    },
  };
  const logging: HttpRoute = {
    methods: ['GET', 'POST'],
    handle: (query, { method }) => {
      const level = query.has('reset') ? initialLevel : query.get('level');
      if (level !== null) {
        if (method !== 'POST') return { status: 405, body: 'levels are changed by POST\n' };
        if (!LEVELS.includes(level)) return { status: 400, body: `level must be one of ${LEVELS.join(', ')}\n` };
        log.level = level;
      }
      return { status: 200, body: `current log level is ${log.level}\n` };
    },
  };
  const quitquitquit: HttpRoute = {
    methods: ['POST'],
    handle: () => {
      setImmediate(quit);
      return { status: 200, body: 'shutdown now\n' };
    },
  };
  return [
    ['/config_dump', dump],
    ['/logging', logging],
    ['/quitquitquit', quitquitquit],
  ];
}
