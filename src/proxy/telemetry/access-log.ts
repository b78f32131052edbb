/** The access log: a line for each connection that ended or was refused, with ztunnel's field names. */
import type { Logger } from '../../mesh/log.js';
import type { AccessRecord } from '../engine.js';
import type { AccessLogMode } from '../settings.js';

/** Ends that are the applications' own business: not a failure of the mesh, nor a refusal by it. */
const ORDINARY: ReadonlySet<string> = new Set(['none', 'application-reset', 'drained']);

export interface RefusalCount {
  readonly reason: string;
  readonly direction: 'inbound' | 'outbound';
  count: number;
}

export class AccessLog {
  readonly #log: Logger;
  readonly #mode: AccessLogMode;
  readonly #refusals = new Map<string, RefusalCount>();

  constructor(log: Logger, mode: AccessLogMode) {
    this.#log = log;
    this.#mode = mode;
  }

  /** Connections that were refused or cut, by reason. */
  get refusals(): Iterable<RefusalCount> {
    return this.#refusals.values();
  }

  /** The engine's batches. */
  onAccess(records: readonly AccessRecord[]): void {
    for (const record of records) {
      const failed = !record.established || !ORDINARY.has(record.reason);
      if (failed) this.#count(record);
      if (this.#mode === 'off' || (this.#mode === 'failures' && !failed)) continue;
      const message = record.established ? 'connection complete' : 'connection failed';
      if (failed) this.#log.warn(accessFields(record), message);
      else this.#log.info(accessFields(record), message);
    }
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
