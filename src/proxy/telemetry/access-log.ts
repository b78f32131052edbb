/** The access log: a line for each connection that ended or was refused, with ztunnel's field names. */
import type { Logger } from '../../mesh/log.js';
import type { AccessRecord } from '../engine.js';
import type { AccessLogMode } from '../settings.js';

/** Takes finished lines: one call a batch. */
export interface LineSink {
  /** @param text lines that end in a line feed @param lines how many */
  write(text: string, lines: number): void;
}

/** Ends that are the applications' own business: not a failure of the mesh, nor a refusal by it. */
const ORDINARY: ReadonlySet<string> = new Set(['none', 'application-reset', 'drained']);

const COMPLETE = 'connection complete';
const FAILED = 'connection failed';

export interface RefusalCount {
  readonly reason: string;
  readonly direction: 'inbound' | 'outbound';
  count: number;
}

export class AccessLog {
  readonly #log: Logger;
  readonly #mode: AccessLogMode;
  readonly #refusals = new Map<string, RefusalCount>();
  readonly #sink: LineSink | undefined;
  /** What stands in each line after its time. */
  readonly #bindings: string;

  /** @param sink takes lines that are written by hand, at a tenth of a logger's cost; without it the logger writes them */
  constructor(log: Logger, mode: AccessLogMode, sink?: LineSink) {
    this.#log = log;
    this.#mode = mode;
    this.#sink = sink;
    this.#bindings = Object.entries(log.bindings())
      .map(([name, value]) => `,${JSON.stringify(name)}:${JSON.stringify(value)}`)
      .join('');
  }

  /** Connections that were refused or cut, by reason. */
  get refusals(): Iterable<RefusalCount> {
    return this.#refusals.values();
  }

  /** The engine's batches. */
  onAccess(records: readonly AccessRecord[]): void {
    const info = this.#mode === 'all' && this.#log.isLevelEnabled('info');
    const warn = this.#mode !== 'off' && this.#log.isLevelEnabled('warn');
    const time = new Date().toISOString();
    let text = '';
    let lines = 0;
    for (const record of records) {
      const failed = !record.established || !ORDINARY.has(record.reason);
      if (failed) this.#count(record);
      if (!(failed ? warn : info)) continue;
      if (this.#sink === undefined) {
        const message = record.established ? COMPLETE : FAILED;
        if (failed) this.#log.warn(accessFields(record), message);
        else this.#log.info(accessFields(record), message);
        continue;
      }
      text += accessLine(record, failed ? 'warn' : 'info', time, this.#bindings);
      lines++;
    }
    if (lines > 0) this.#sink?.write(text, lines);
  }

  #count({ reason, inbound }: AccessRecord): void {
    const key = inbound ? `i${reason}` : `o${reason}`;
    const counted = this.#refusals.get(key);
    // Reasons are enumerated, so the map is bounded.
    if (counted === undefined) {
      this.#refusals.set(key, { reason, direction: inbound ? 'inbound' : 'outbound', count: 1 });
    } else counted.count++;
  }
}

/** Fields of a line. What is not known is left out. */
export function accessFields(record: AccessRecord): Record<string, string | number> {
  const { sourceWorkload: source, destinationWorkload: destination, reason } = record;
  const fields: Record<string, string | number> = { scope: 'access', 'src.addr': record.source };
  if (source !== undefined) {
    fields['src.workload'] = source.name;
    fields['src.namespace'] = source.namespace;
    fields['src.cluster'] = source.cluster;
  }
  if (record.sourceIdentity !== '') fields['src.identity'] = record.sourceIdentity;
  fields['dst.addr'] = record.destination;
  if (record.hboneAddress !== '') fields['dst.hbone_addr'] = record.hboneAddress;
  if (record.service !== '') fields['dst.service'] = record.service;
  if (destination !== undefined) {
    fields['dst.workload'] = destination.name;
    fields['dst.namespace'] = destination.namespace;
    fields['dst.cluster'] = destination.cluster;
  }
  if (record.destinationIdentity !== '') fields['dst.identity'] = record.destinationIdentity;
  fields['direction'] = record.inbound ? 'inbound' : 'outbound';
  fields['bytes_sent'] = record.bytesSent;
  fields['bytes_recv'] = record.bytesReceived;
  fields['duration'] = `${Math.round(record.durationMs)}ms`;
  fields['response_flags'] = record.responseFlag;
  if (record.traceId !== '') fields['trace_id'] = record.traceId;
  if (reason !== 'none') {
    fields['reason'] = reason;
    fields['error'] = record.detail === '' ? reason : `${reason}: ${record.detail}`;
    if (record.hint !== '') fields['hint'] = record.hint;
  }
  return fields;
}

/** What JSON must escape in a text; lone surrogates cannot come out of the engine, whose texts are decoded UTF-8. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: these are the ones.
const ESCAPED = /["\\\x00-\x1f]/;

const quote = (text: string): string => (ESCAPED.test(text) ? JSON.stringify(text) : `"${text}"`);

/**
 * The line that the logger would write of {@link accessFields}, made at a tenth of the cost: its shape is known.
 * @param bindings what the logger adds to each line, as JSON members with a comma before each
 */
export function accessLine(record: AccessRecord, level: 'info' | 'warn', time: string, bindings: string): string {
  const { sourceWorkload: source, destinationWorkload: destination, reason } = record;
  let line = `{"level":"${level}","time":"${time}"${bindings},"scope":"access","src.addr":${quote(record.source)}`;
  if (source !== undefined) {
    line += `,"src.workload":${quote(source.name)},"src.namespace":${quote(source.namespace)},"src.cluster":${quote(source.cluster)}`;
  }
  if (record.sourceIdentity !== '') line += `,"src.identity":${quote(record.sourceIdentity)}`;
  line += `,"dst.addr":${quote(record.destination)}`;
  if (record.hboneAddress !== '') line += `,"dst.hbone_addr":${quote(record.hboneAddress)}`;
  if (record.service !== '') line += `,"dst.service":${quote(record.service)}`;
  if (destination !== undefined) {
    line += `,"dst.workload":${quote(destination.name)},"dst.namespace":${quote(destination.namespace)},"dst.cluster":${quote(destination.cluster)}`;
  }
  if (record.destinationIdentity !== '') line += `,"dst.identity":${quote(record.destinationIdentity)}`;
  line += `,"direction":"${record.inbound ? 'inbound' : 'outbound'}","bytes_sent":${record.bytesSent},"bytes_recv":${record.bytesReceived}`;
  line += `,"duration":"${Math.round(record.durationMs)}ms","response_flags":${quote(record.responseFlag)}`;
  if (record.traceId !== '') line += `,"trace_id":${quote(record.traceId)}`;
  if (reason !== 'none') {
    line += `,"reason":${quote(reason)},"error":${quote(record.detail === '' ? reason : `${reason}: ${record.detail}`)}`;
    if (record.hint !== '') line += `,"hint":${quote(record.hint)}`;
  }
  return `${line},"msg":"${record.established ? COMPLETE : FAILED}"}\n`;
}
