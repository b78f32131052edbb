/** The controller: objects in, resources and certificates out, on one TLS port. */
import { join } from 'node:path';
import { Server } from '@grpc/grpc-js';
import type { Logger } from '../mesh/log.js';
import { createAuthority } from './authority.js';
import { certificateGate, certificateHandler } from './certificates.js';
import { Debounce } from './debounce.js';
import { certificateService, discoveryService } from './grpc.js';
import { type ClusterObjects, namespaceOf, type Problem, serviceAccountOf } from './objects.js';
import { type BuilderOptions, ResourceBuilder } from './resources.js';
import { loadRoot } from './root.js';
import { watchRoot } from './root-watch.js';
import { renewingCredentials, serverNames } from './server-certificate.js';
import type { ControllerSettings } from './settings.js';
import { NodeTokens } from './tokens.js';
import { isTerminal } from './workloads.js';
import { XdsServer } from './xds.js';

/** Where objects come from. */
export interface ObjectSource {
  /**
   * Reads everything and goes on to watch. Resolves with the first whole state.
   * @param changed called with each whole state after that
   */
  start(changed: (objects: ClusterObjects) => void): Promise<ClusterObjects>;
  /** Where an object was read from, for messages. */
  locate(object: object): string | undefined;
  close(): Promise<void> | void;
}

export interface RunningController {
  /** The port that is listened on. */
  readonly port: number;
  /** Streams that are open. */
  readonly streams: number;
  close(): Promise<void>;
}

/** Changes are gathered until this long nothing happens, and no longer than the second figure. */
const DEBOUNCE_QUIET_MS = 50;
const DEBOUNCE_MAX_MS = 1000;
/** Open calls may end by themselves for this long when the controller stops. */
const SHUTDOWN_MS = 1000;

/** A client that reconnects names all versions it has: 100,000 resources are some 8 MiB. */
const MAX_REQUEST_BYTES = 32 << 20;
const SERVER_OPTIONS = {
  'grpc.max_receive_message_length': MAX_REQUEST_BYTES,
  'grpc.max_send_message_length': -1,
  'grpc.max_concurrent_streams': 1000,
  'grpc.keepalive_time_ms': 30_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc-node.max_session_memory': 64,
};

/** What `startController` needs besides its settings. */
export interface ControllerOptions {
  readonly source: ObjectSource;
  readonly log: Logger;
  readonly belongsInMesh: BuilderOptions['belongsInMesh'];
}

/**
 * Starts the controller. Resolves once it listens, which is not before it has a whole state to tell.
 * @throws Error where it cannot start; the source is closed then
 */
export async function startController(
  settings: ControllerSettings,
  options: ControllerOptions,
): Promise<RunningController> {
  try {
    return await start(settings, options);
  } catch (error) {
    await options.source.close();
    throw error;
  }
}

async function start(
  settings: ControllerSettings,
  { source, log, belongsInMesh }: ControllerOptions,
): Promise<RunningController> {
  const root = await loadRoot(settings.data);
  let authority = createAuthority(root);
  const tokens = new NodeTokens(join(settings.data, 'tokens'));
  const nodeOf = (token: string): string | undefined => tokens.nodeOf(token);
  const xds = new XdsServer(log, nodeOf);
  const builder = new ResourceBuilder({ ...settings, belongsInMesh });
  const reporter = new ProblemReporter(log, source);
  let scheduled = new Set<string>();

  const apply = (objects: ClusterObjects): void => {
    const started = performance.now();
    const result = builder.build(objects);
    const built = performance.now();
    const change = tokens.setNodes(objects.nodes.map(({ metadata }) => metadata.name));
    for (const node of change.removed) xds.endNode(node);
    for (const node of change.refused) log.error({ event: 'bad_node_name', node }, 'no token: not the name of a Node');
    scheduled = schedule(objects);
    const changed = xds.publish(result);
    reporter.report(result.problems);
    log.info(
      {
        event: 'published',
        ...changed,
        resources: result.addresses.size + result.authorizations.size,
        nodesAdded: change.added.length,
        nodesRemoved: change.removed.length,
        streams: xds.streams,
        buildMs: Math.round(built - started),
        publishMs: Math.round(performance.now() - built),
      },
      'published the state of the cluster',
    );
  };

  let latest: ClusterObjects | undefined;
  const debounce = new Debounce(
    () => {
      if (latest === undefined) return;
      try {
        apply(latest);
      } catch (error) {
        log.error({ event: 'build_failed', err: error }, 'could not build resources; the last good state stays');
      }
    },
    DEBOUNCE_QUIET_MS,
    DEBOUNCE_MAX_MS,
  );
  apply(
    await source.start((objects) => {
      latest = objects;
      debounce.call();
    }),
  );

  const own = await renewingCredentials(() => authority, serverNames(settings.listen, settings.clusterDomain), log);
  const rootWatch = watchRoot({
    directory: settings.data,
    root,
    log,
    ttlSeconds: settings.ttlSeconds,
    changed(next) {
      authority = createAuthority(next);
      return own.renew();
    },
  });
  const server = new Server({ ...SERVER_OPTIONS, interceptors: [certificateGate({ log, nodeOf })] });
  server.addService(discoveryService, { deltaAggregatedResources: xds.handle.bind(xds) });
  server.addService(certificateService, {
    createCertificate: certificateHandler({
      log,
      authority: () => authority,
      trustDomain: settings.trustDomain,
      ttlSeconds: settings.ttlSeconds,
      nodeOf,
      runsOn: (node, namespace, serviceAccount) => scheduled.has(placeKey(node, namespace, serviceAccount)),
    }),
  });
  const stop = async (): Promise<void> => {
    debounce.close();
    await source.close();
    rootWatch.close();
    own.close();
  };
  const { host } = settings.listen;
  const target = `${host.includes(':') ? `[${host}]` : host}:${settings.listen.port}`;
  const port = await bind(server, target, own.credentials).catch((error: unknown) => {
    debounce.close();
    rootWatch.close();
    own.close();
    throw error;
  });
  log.info({ event: 'listening', address: host, port }, 'xDS and certificate authority are listening');
  return {
    port,
    get streams() {
      return xds.streams;
    },
    async close() {
      await stop();
      xds.close();
      await new Promise<void>((resolve) => {
        const timer = setTimeout(() => {
          server.forceShutdown();
          resolve();
        }, SHUTDOWN_MS);
        server.tryShutdown(() => {
          clearTimeout(timer);
          resolve();
        });
      });
      log.info({ event: 'stopped' }, 'stopped');
    },
  };
}

function bind(server: Server, target: string, credentials: Parameters<Server['bindAsync']>[1]): Promise<number> {
  return new Promise((resolve, reject) => {
    server.bindAsync(target, credentials, (error, port) => {
      if (error === null) resolve(port);
      else reject(new Error(`cannot listen on ${target}: ${error.message}; choose another address with --listen`));
    });
  });
}

const placeKey = (node: string, namespace: string, serviceAccount: string): string =>
  `${node}/${namespace}/${serviceAccount}`;

/** Which service accounts have a pod on which node; a pod that has ended runs nothing. */
function schedule(objects: ClusterObjects): Set<string> {
  const places = new Set<string>();
  for (const pod of objects.pods) {
    const node = pod.spec?.nodeName;
    if (node === undefined || node === '' || isTerminal(pod)) continue;
    places.add(placeKey(node, namespaceOf(pod), serviceAccountOf(pod)));
  }
  return places;
}

/** Logs each problem when it appears and when it is gone, not every time resources are built. */
class ProblemReporter {
  readonly #log: Logger;
  readonly #source: ObjectSource;
  #known = new Map<string, Problem>();

  constructor(log: Logger, source: ObjectSource) {
    this.#log = log;
    this.#source = source;
  }

  report(problems: readonly Problem[]): void {
    const next = new Map(problems.map((problem) => [`${problem.object}: ${problem.message}`, problem]));
    for (const [key, { object, message, source }] of next) {
      if (this.#known.has(key)) continue;
      const file = source === undefined ? undefined : this.#source.locate(source);
      this.#log.error(
        { event: 'object_problem', object, file, reason: message },
        'an object cannot be used as written',
      );
    }
    for (const [key, { object, message }] of this.#known) {
      if (!next.has(key)) this.#log.info({ event: 'object_mended', object, reason: message }, 'an object is mended');
    }
    this.#known = next;
  }
}
