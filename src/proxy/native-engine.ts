/** Loads native/engine and gives it the shape of engine.ts. The only file that knows where the addon lies. */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import type { AccessRecord, AccessWorkload, Engine, EngineListener, EngineOptions } from './engine.js';

type Field = string | number | undefined;

/** What the addon exports (native/engine/binding.cc). */
interface Addon extends Engine {
  readonly opensslCompiled: string;
  readonly opensslRunning: string;
  readonly trafficLabelNames: readonly string[];
  readonly fieldsPerRecord: number;
  readonly reasons: {
    readonly names: readonly string[];
    readonly hints: readonly string[];
    readonly flags: readonly string[];
  };
  create(
    options: EngineOptions,
    onAccess: (fields: readonly Field[]) => void,
    onCertificateNeeded: (identity: string) => void,
    onFault: (where: string, what: string, count: number) => void,
  ): void;
}

/** From src/proxy and from dist/proxy alike. */
const addonPath = fileURLToPath(new URL('../../native/build/Release/engine.node', import.meta.url));

/** The fields of one record in `onAccess`, in the order of native/engine/binding_events.cc. */
const fieldsPerRecord = 19;

/** Says what to do when the dynamic linker refused the addon. */
export function explainLoadFailure(error: unknown): Error {
  const message = error instanceof Error ? error.message : String(error);
  const symbol = /undefined symbol: (\w+)/.exec(message)?.[1];
  const advice =
    symbol === undefined
      ? 'Build it with `npm run build:native`.'
      : `This node executable does not export ${symbol}, which the engine takes from it (OpenSSL, nghttp2). ` +
        'Use the Node release that package.json names, from node_modules/.bin, and build again.';
  return new Error(`cannot load the engine ${addonPath}: ${message}. ${advice}`, { cause: error });
}

/** Throws unless the OpenSSL that the addon was compiled for is the one that runs. Versions as `major.minor...`. */
export function checkOpenssl(compiled: string, running: string, node: string): void {
  const minor = (version: string) => version.split('.').slice(0, 2).join('.');
  if (minor(compiled) === minor(running) && minor(running) === minor(node)) return;
  throw new Error(
    `the engine was compiled for OpenSSL ${compiled}, OpenSSL ${running} is loaded and this Node has OpenSSL ${node}. ` +
      'Build the engine with the headers of the Node that runs it: `npm run build:native`.',
  );
}

function load(): Addon {
  let addon: Addon;
  try {
    addon = createRequire(import.meta.url)(addonPath) as Addon;
  } catch (error) {
    throw explainLoadFailure(error);
  }
  checkOpenssl(addon.opensslCompiled, addon.opensslRunning, process.versions.openssl);
  if (addon.fieldsPerRecord !== fieldsPerRecord) {
    throw new Error(`the engine ${addonPath} is older or newer than this program. Build it with \`npm run build\`.`);
  }
  return addon;
}

let loaded: Addon | undefined;

function theAddon(): Addon {
  loaded ??= load();
  return loaded;
}

/** Names of `TrafficSample.labels`, in their order. */
export function trafficLabelNames(): readonly string[] {
  return theAddon().trafficLabelNames;
}

function text(field: Field): string {
  return typeof field === 'string' ? field : '';
}

function numeric(field: Field): number {
  return typeof field === 'number' ? field : 0;
}

function workload(name: Field, namespace: Field, cluster: Field): AccessWorkload | undefined {
  return name === undefined ? undefined : { name: text(name), namespace: text(namespace), cluster: text(cluster) };
}

function recordAt(fields: readonly Field[], at: number, reasons: Addon['reasons']): AccessRecord {
  const flags = numeric(fields[at]);
  const reason = numeric(fields[at + 1]);
  const source = workload(fields[at + 6], fields[at + 7], fields[at + 8]);
  const destination = workload(fields[at + 9], fields[at + 10], fields[at + 11]);
  return {
    inbound: (flags & 1) !== 0,
    established: (flags & 2) !== 0,
    reason: reasons.names[reason] ?? 'internal',
    hint: reasons.hints[reason] ?? '',
    responseFlag: reasons.flags[reason] ?? '-',
    detail: text(fields[at + 2]),
    source: text(fields[at + 3]),
    destination: text(fields[at + 4]),
    hboneAddress: text(fields[at + 5]),
    ...(source && { sourceWorkload: source }),
    ...(destination && { destinationWorkload: destination }),
    service: text(fields[at + 12]),
    sourceIdentity: text(fields[at + 13]),
    destinationIdentity: text(fields[at + 14]),
    bytesSent: numeric(fields[at + 15]),
    bytesReceived: numeric(fields[at + 16]),
    durationMs: numeric(fields[at + 17]),
    traceId: text(fields[at + 18]),
  };
}

/** Records from the flat list that the addon gives. */
export function recordsOf(fields: readonly Field[], reasons: Addon['reasons']): AccessRecord[] {
  const records: AccessRecord[] = [];
  for (let at = 0; at < fields.length; at += fieldsPerRecord) records.push(recordAt(fields, at, reasons));
  return records;
}

/**
 * Makes the engine of this process; a second one before `stopNow` throws. Throws too, saying what to do, when the addon
 * cannot be loaded or does not fit this Node. It does not keep the process alive, but for a `drain` that is under way.
 */
export function createEngine(options: EngineOptions, listener: EngineListener): Engine {
  const addon = theAddon();
  addon.create(
    options,
    (fields) => listener.onAccess(recordsOf(fields, addon.reasons)),
    (identity) => listener.onCertificateNeeded(identity),
    (where, what, count) => listener.onFault({ where, what, count }),
  );
  // process.exit() and uncaught exceptions come by here while JavaScript can still take the last records.
  const stopAtExit = (): void => addon.stopNow();
  process.once('exit', stopAtExit);
  return {
    start: () => addon.start(),
    addPod: (pod) => addon.addPod(pod),
    removePod: (uid) => addon.removePod(uid),
    setCertificate: (identity, bundle) => addon.setCertificate(identity, bundle),
    removeCertificate: (identity) => addon.removeCertificate(identity),
    apply: (delta) => addon.apply(delta),
    traffic: () => addon.traffic(),
    connections: () => addon.connections(),
    stats: () => addon.stats(),
    drain: (deadlineMs) => addon.drain(deadlineMs),
    stopNow: () => {
      process.removeListener('exit', stopAtExit);
      addon.stopNow();
    },
  };
}
