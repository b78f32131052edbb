/** The agent's HTTP port: metrics, and readiness that means "the pods of this node are captured". */

import { type HttpAnswer, type HttpListener, type HttpRoute, listenHttp } from '../mesh/http.js';
import type { Logger } from '../mesh/log.js';
import type { AgentMetrics, MetricSources } from './metrics.js';

const READ = ['GET', 'HEAD'];

export interface AgentHttpOptions {
  readonly port: number;
  readonly log: Logger;
  readonly sources: MetricSources;
  /** What the agent still waits for; empty when ready. */
  pending(): readonly string[];
}

/** Resolves once it listens. @throws Error with what to do where it cannot */
export async function startAgentHttp({ port, log, sources, pending }: AgentHttpOptions): Promise<HttpListener> {
  let metrics: AgentMetrics | undefined;
  const scrape: HttpRoute = {
    methods: READ,
    handle: async () => {
      const module = await import('./metrics.js');
      metrics ??= new module.AgentMetrics(sources);
      return { status: 200, type: metrics.contentType, body: await metrics.render() };
    },
  };
  const readiness: HttpRoute = { methods: READ, handle: () => readinessAnswer(pending()) };
  return listenHttp({
    what: "the agent's metrics and readiness",
    port,
    routes: new Map<string, HttpRoute>([
      ['/metrics', scrape],
      ['/stats/prometheus', scrape],
      ['/healthz/ready', readiness],
      ['/readyz', readiness],
      ['/healthz', { methods: READ, handle: () => ({ status: 200, body: 'ok\n' }) }],
    ]),
    onError: (error) => log.error({ event: 'http_failed', err: error }, 'an HTTP request failed'),
  });
}

function readinessAnswer(pending: readonly string[]): HttpAnswer {
  if (pending.length === 0) return { status: 200, body: 'ready\n' };
  return { status: 503, body: `not ready, pending: ${pending.join(', ')}\n` };
}
