/** The proxy: engine, node agent, controller and certificate authority put together, and how they stop. */

import { AUTHORIZATION_TYPE } from '../mesh/control-plane.js';
import { DEFAULT_TRUST_DOMAIN, parseIdentity } from '../mesh/identity.js';
import type { Logger } from '../mesh/log.js';
import type { SeqpacketConnection } from '../mesh/seqpacket.js';
import { AuthorityClient } from './certificates/authority-client.js';
import { CertificateManager } from './certificates/manager.js';
import { ProxyClock } from './clock.js';
import type { Engine, EngineListener, EngineOptions } from './engine.js';
import { type PodInfo, Pods } from './pods.js';
import { type Servers, startServers } from './servers.js';
import type { ProxySettings } from './settings.js';
import { AccessLog } from './telemetry/access-log.js';
import type { LogStream } from './telemetry/log-stream.js';
import { XdsClient } from './xds/client.js';
import { MeshState } from './xds/mesh-state.js';
import { xdsNode } from './xds/node.js';
import { ZdsClient } from './zds/client.js';

/** The native parts, given so that tests of the shell need no kernel. */
export interface NativeParts {
  readonly createEngine: (options: EngineOptions, listener: EngineListener) => Engine;
  readonly trafficLabelNames: readonly string[];
  readonly connectZds: (path: string) => Promise<SeqpacketConnection> | SeqpacketConnection;
}

export interface ProxyOptions {
  readonly settings: ProxySettings;
  readonly native: NativeParts;
  readonly log: Logger;
  /** Where `log` writes, for its count of dropped lines. */
  readonly logStream?: LogStream;
  readonly version: string;
  /** Somebody asked over HTTP that the proxy stops. */
  readonly onQuit: () => void;
}

export interface RunningProxy {
  readonly ports: Servers['ports'];
  /** What is still waited for; empty when ready. */
  pending(): readonly string[];
  /** Lets connections end for as long as the settings say, then stops everything. */
  drain(): Promise<void>;
  /** Stops everything at once; also the end of `drain`. Idempotent. */
  stopNow(): void;
}

/** Starts the proxy. Resolves when it listens for its HTTP ports; what it waits for then `pending` tells. */
export async function startProxy(options: ProxyOptions): Promise<RunningProxy> {
  const { settings, native, log, version } = options;
  const accessLog = new AccessLog(log, settings.accessLog, options.logStream);
  const engine = native.createEngine(engineOptions(settings), {
    onAccess: (records) => accessLog.onAccess(records),
    onCertificateNeeded: (identity) => certificateNeeded(identity),
    onFault: (fault) =>
      log.error({ event: 'engine_fault', ...fault }, 'something failed in the engine and was contained'),
  });
  const state = new MeshState(settings.nodeName);
  const clock = new ProxyClock({
    log,
    controller: settings.xds,
    onJump: () => {
      certificates.clockJumped();
      xds.retryNow();
    },
  });
  const certificates = new CertificateManager({
    source: new AuthorityClient(settings.ca, settings.secretTtlSeconds, {
      onTime: (offset) => clock.told('certificate authority', offset),
      onFailure: (error) => clock.failed(error, settings.ca),
    }),
    sink: engine,
    log,
  });
  const trustDomainOf = ({ namespace, name, serviceAccount }: PodInfo): string =>
    state.localWorkload(namespace, name, serviceAccount)?.trustDomain ?? settings.trustDomain ?? DEFAULT_TRUST_DOMAIN;
  const pods = new Pods({ engine, certificates, log, trustDomainOf });
  let synced = false;
  const zds = new ZdsClient({ path: settings.inpodUds, connect: native.connectZds, pods, log, canServe: () => synced });
  const xds = new XdsClient({
    settings: settings.xds,
    node: xdsNode(settings),
    state,
    log,
    apply: (delta) => engine.apply(delta),
    onApplied: () => pods.refreshIdentities(),
    onConnected: () => certificates.retryFailed(),
    onTime: (offset) => clock.told('controller', offset),
    onFailure: (error) => clock.failed(error, settings.xds),
    onSynced: () => {
      log.info({ event: 'xds_synced' }, 'received the state of the mesh');
      synced = true;
      zds.ready();
    },
  });

  /** The engine asks at the rate of connections; what is no pod's identity here is never fetched. */
  const unknown = new Set<string>();
  function certificateNeeded(identity: string): void {
    if (certificates.need(identity) || unknown.has(identity) || unknown.size >= 1000) return;
    unknown.add(identity);
    const parsed = parseIdentity(identity);
    log.warn(
      { event: 'certificate_not_ours', identity, namespace: parsed?.namespace, serviceAccount: parsed?.serviceAccount },
      'a connection waits for a certificate of an identity that no pod of this node has; it is refused',
    );
  }

  const pending = (): string[] => {
    const waiting = xds.pending.map((type) => (type === AUTHORIZATION_TYPE ? 'policies' : 'workloads'));
    return [
      ...waiting.map((what) => `${what} from the controller`),
      ...(zds.synced ? [] : ['pods from the node agent']),
      ...pods.pending.map(({ pod, error }) => `pod ${pod.namespace}/${pod.name} (${error})`),
      ...(draining ? ['the proxy is stopping'] : []),
    ];
  };

  let draining = false;
  let stopped = false;
  let servers: Servers | undefined;
  const stopNow = (): void => {
    if (stopped) return;
    stopped = true;
    clock.stop();
    zds.stop();
    xds.stop();
    pods.stop();
    certificates.stop();
    servers?.close();
    engine.stopNow();
  };
  try {
    servers = await startServers({
      ports: settings.ports,
      log,
      sources: {
        version,
        settings,
        engine,
        trafficLabelNames: native.trafficLabelNames,
        accessLog,
        logStream: options.logStream,
        pods,
        certificates,
        xds,
        clock,
        state,
      },
      pending,
      quit: options.onQuit,
    });
    engine.start();
    // ztunnel waits for the controller before it takes pods; here a pod's connections wait for what they need, with a limit.
    xds.start();
    zds.start();
  } catch (error) {
    stopNow();
    throw error;
  }
  return {
    ports: servers.ports,
    pending,
    stopNow,
    async drain() {
      draining = true;
      // Policies and certificates go on for the connections that are open.
      zds.stop();
      pods.stop();
      await engine.drain(settings.drainMs);
      stopNow();
    },
  };
}

function engineOptions(settings: ProxySettings): EngineOptions {
  const { workers, nodeName, network, clusterId, streamWindow, connectionWindow } = settings;
  const { frameSize, maxStreamsPerConnection, poolIdleMs } = settings;
  return {
    workers,
    nodeName,
    network,
    clusterId,
    streamWindow,
    connectionWindow,
    frameSize,
    maxStreamsPerConnection,
    poolIdleMs,
  };
}
