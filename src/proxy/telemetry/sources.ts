/** What metrics and the config dump are made from; types only, so that neither is loaded before it is asked for. */
import type { CertificateManager } from '../certificates/manager.js';
import type { ProxyClock } from '../clock.js';
import type { Engine } from '../engine.js';
import type { Pods } from '../pods.js';
import type { ProxySettings } from '../settings.js';
import type { XdsClient } from '../xds/client.js';
import type { MeshState } from '../xds/mesh-state.js';
import type { AccessLog } from './access-log.js';
import type { LogStream } from './log-stream.js';

export interface MetricSources {
  readonly version: string;
  readonly engine: Pick<Engine, 'traffic' | 'stats'>;
  /** Order of `TrafficSample.labels`. */
  readonly trafficLabelNames: readonly string[];
  readonly accessLog: AccessLog;
  readonly logStream: LogStream | undefined;
  readonly pods: Pick<Pods, 'active' | 'pending' | 'counters'>;
  readonly certificates: Pick<CertificateManager, 'list' | 'counters'>;
  readonly xds: Pick<XdsClient, 'counters' | 'connected'>;
  readonly clock: Pick<ProxyClock, 'skewMs'>;
}

export interface DumpSources {
  readonly version: string;
  readonly settings: ProxySettings;
  readonly state: Pick<MeshState, 'everything'>;
  readonly certificates: Pick<CertificateManager, 'list'>;
  readonly pods: Pick<Pods, 'list'>;
  readonly engine: Pick<Engine, 'connections' | 'stats'>;
}
