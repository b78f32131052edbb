/** The controller: objects in, resources and certificates out, on one TLS port. */
import { Server } from '@grpc/grpc-js';
import { watchClock } from '../mesh/clock.js';
import { ClockSkew } from '../mesh/clock-skew.js';
import type { Logger } from '../mesh/log.js';
import type { Authority } from './authority.js';
import type { Callers } from './callers.js';
import { certificateGate, certificateHandler } from './certificates.js';
import { Debounce } from './debounce.js';
import { folderTrust } from './folder-trust.js';
import { certificateService, discoveryService } from './grpc.js';
import type { ClusterObjects, Pod, Problem } from './objects.js';
import { Places } from './places.js';
import { type BuilderOptions, type Dirty, type PodChanges, ResourceBuilder } from './resources.js';
import { renewingCredentials, serverNames } from './server-certificate.js';
import type { ServeSettings } from './settings.js';
import { XdsServer } from './xds.js';

/** Where objects come from. */
export interface ObjectSource {
  /**
   * Reads everything and goes on to watch. Resolves with the first whole state.
   * @param changed called with each whole state after that; with `change` where it is known what changed
   */
  start(changed: (objects: ClusterObjects, change?: SourceChange) => void): Promise<ClusterObjects>;
  /** Where an object was read from, for messages. */
  locate(object: object): string | undefined;
  close(): Promise<void> | void;
}

/** What changed: those pods and nothing else, or no pods but what is of those namespaces and nodes. */
export type SourceChange = { readonly pods: PodChanges } | { readonly dirty: Dirty };

export interface RunningController {
  /** The port that is listened on. */
  readonly port: number;
  /** Streams that are open. */
  readonly streams: number;
  close(): Promise<void>;
}

/** Changes are gathered until this long nothing happens, and no longer than the second figure. */
const DEBOUNCE_QUIET_MS = 30;
const DEBOUNCE_MAX_MS = 200;
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
  /** Folder of root and node tokens; where there is none, `trust` tells who signs and who may ask. */
  readonly data?: string;
  readonly trust?: Trust;
  /** Called when what is wrong with the objects was found out anew, which is whenever anything but pods changed. */
  checked?(objects: ClusterObjects, problems: readonly Problem[]): void;
}

/** Who signs and who may ask. */
export interface Trust {
  /** The authority of now: it is another one after its root was replaced. */
  authority(): Authority;
  /** @param changed called after the authority became another one; not before a server certificate of it is there */
  onChange(changed: () => void | Promise<void>): void;
  callers(places: Places): Callers;
}

/**
 * Starts the controller. Resolves once it listens, which is not before it has a whole state to tell.
 * @throws Error where it cannot start; the source is closed then
 */
export async function startController(settings: ServeSettings, options: ControllerOptions): Promise<RunningController> {
  try {
    return await start(settings, options);
  } catch (error) {
    await options.source.close();
    throw error;
  }
}

async function start(
  settings: ServeSettings,
  { source, log, belongsInMesh, data, trust: given, checked }: ControllerOptions,
): Promise<RunningController> {
  const folder = data === undefined ? undefined : await folderTrust(data, settings.ttlSeconds, log);
  const trust = given ?? folder;
  if (trust === undefined) throw new Error('a controller needs a data folder or a trust of its own');
  const places = new Places();
  const callers = trust.callers(places);
  const xds = new XdsServer(log, (token) => callers.authenticate(token));
  const builder = new ResourceBuilder({ ...settings, belongsInMesh });
  const reporter = new ProblemReporter(log, source);

  const applyAll = (objects: ClusterObjects, dirty?: Dirty): void => {
    const started = performance.now();
    const result = builder.build(objects, dirty);
    const built = performance.now();
    const change = folder?.tokens.setNodes(objects.nodes.map(({ metadata }) => metadata.name));
    for (const node of change?.refused ?? []) {
      log.error({ event: 'bad_node_name', node }, 'no token: not the name of a Node');
    }
    if (dirty === undefined) places.replace(objects.pods);
    const resources = result.addresses.size + result.authorizations.size;
    const changed = xds.publish(result);
    xds.recheck((caller) => callers.remains(caller));
    reporter.report(result.problems);
    checked?.(objects, result.problems);
    log.info(
      {
        event: 'published',
        ...changed,
        resources,
        nodesAdded: change?.added.length,
        nodesRemoved: change?.removed.length,
        streams: xds.streams,
        buildMs: Math.round(built - started),
        publishMs: Math.round(performance.now() - built),
      },
      'published the state of the cluster',
    );
  };
  const applyPods = (pods: PodChanges): void => {
    const started = performance.now();
    const delta = builder.update(pods);
    const built = performance.now();
    const changed = xds.publishAddresses(delta);
    xds.recheck((caller) => callers.remains(caller));
    log.debug(
      {
        event: 'published',
        ...changed,
        pods: pods.size,
        streams: xds.streams,
        buildMs: Math.round(built - started),
        publishMs: Math.round(performance.now() - built),
      },
      'published changes of pods',
    );
  };

  let whole: { readonly objects: ClusterObjects; readonly dirty: Dirty | undefined } | undefined;
  let pods = new Map<string, Pod | undefined>();
  let broken = false;
  const debounce = new Debounce(
    () => {
      const [due, changed] = [whole, pods];
      whole = undefined;
      pods = new Map();
      try {
        if (due === undefined) applyPods(changed);
        else {
          if (due.dirty !== undefined) builder.update(changed);
          applyAll(due.objects, due.dirty);
        }
      } catch (error) {
        // What of this change was remembered is not known: the next one builds everything.
        broken = true;
        log.error({ event: 'build_failed', err: error }, 'could not build resources; the last good state stays');
      }
    },
    DEBOUNCE_QUIET_MS,
    DEBOUNCE_MAX_MS,
  );
  applyAll(
    await source.start((objects, change) => {
      if (change === undefined || broken) whole = { objects, dirty: undefined };
      else if ('dirty' in change) {
        const dirty = whole === undefined ? change.dirty : whole.dirty && joined(whole.dirty, change.dirty);
        whole = { objects, dirty };
      }
      if (change !== undefined && 'pods' in change) {
        // At once: the proxy of a new pod asks for its certificate as soon as it is told of it.
        places.update(change.pods);
        for (const [key, pod] of change.pods) pods.set(key, pod);
      }
      broken = false;
      debounce.call();
    }),
  );

  const own = await renewingCredentials(
    () => trust.authority(),
    serverNames(settings.listen, settings.clusterDomain, settings.serverNames),
    log,
  );
  trust.onChange(() => own.renew());
  // What a wrong clock signed would be refused by proxies until half of its life has passed.
  const skew = new ClockSkew(log);
  const clock = watchClock((jump) => {
    skew.jumped(jump);
    void own.renew();
  });
  const server = new Server({ ...SERVER_OPTIONS, interceptors: [certificateGate({ log, callers })] });
  server.addService(discoveryService, { deltaAggregatedResources: xds.handle.bind(xds) });
  server.addService(certificateService, {
    createCertificate: certificateHandler({
      log,
      authority: () => trust.authority(),
      trustDomain: settings.trustDomain,
      ttlSeconds: settings.ttlSeconds,
      callers,
    }),
  });
  const stop = async (): Promise<void> => {
    debounce.close();
    await source.close();
    folder?.close();
    own.close();
    clock.close();
  };
  const { host } = settings.listen;
  const target = `${host.includes(':') ? `[${host}]` : host}:${settings.listen.port}`;
  const port = await bind(server, target, own.credentials).catch((error: unknown) => {
    debounce.close();
    folder?.close();
    own.close();
    clock.close();
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

function joined(left: Dirty, right: Dirty): Dirty {
  return {
    namespaces: new Set([...left.namespaces, ...right.namespaces]),
    nodes: new Set([...left.nodes, ...right.nodes]),
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
