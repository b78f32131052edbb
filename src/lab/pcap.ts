/** Reads a packet capture and says what was on the wire: per TCP connection, which protocol each side spoke. */
import { readFileSync } from 'node:fs';

/** One TCP connection of a capture. */
export interface WireConnection {
  /** address:port of both ends, the connecting side first where its SYN was seen */
  readonly client: string;
  readonly server: string;
  readonly serverPort: number;
  /** When its first packet passed, in milliseconds since 1970. */
  readonly startedMs: number;
  /** Bytes of payload, both directions. */
  readonly payloadBytes: number;
  /** `empty`: no payload; `tls1.3`: nothing but TLS records, TLS 1.3 negotiated; otherwise what was seen instead. */
  readonly protocol: string;
}

export interface WireReport {
  readonly packets: number;
  readonly connections: readonly WireConnection[];
  /** Packets that are neither TCP nor neighbour discovery (ARP, ICMPv6), described. */
  readonly others: readonly string[];
  /** Which of the markers were found in clear, and where first. */
  readonly markersFound: readonly { readonly marker: string; readonly where: string }[];
}

interface Stream {
  readonly startedMs: number;
  /** Sequence number of the next byte; undefined until the first packet. */
  next: number | undefined;
  bytes: number;
  /** Stream bytes from the start, until a gap or HEAD_LIMIT. */
  chunks: Buffer[];
  kept: number;
  gap: boolean;
  syn: boolean;
  /** Segments that came early, by sequence number. */
  early: Map<number, Buffer>;
}

/** Magic numbers of the file format, by the unit of its timestamps. */
const MICROSECONDS = 0xa1b2c3d4;
const NANOSECONDS = 0xa1b23c4d;
const HEAD_LIMIT = 64 << 20;
const EARLY_LIMIT = 4096;

/**
 * Analyses a capture file (libpcap format, Ethernet).
 * @param markers texts that must not be seen in clear
 * @throws Error when the file is not a capture
 */
export function analyseCapture(file: string, markers: readonly string[]): WireReport {
  const data = readFileSync(file);
  const magic = data.length >= 24 ? data.readUInt32LE(0) : 0;
  if (magic !== MICROSECONDS && magic !== NANOSECONDS)
    throw new Error(`${file} is no capture of this machine's byte order`);
  if (data.readUInt32LE(20) !== 1) throw new Error(`${file}: link type ${data.readUInt32LE(20)} is not Ethernet`);
  const streams = new Map<string, Stream>();
  const others = new Map<string, number>();
  const found = new Map<string, string>();
  let packets = 0;
  for (let at = 24; at + 16 <= data.length; ) {
    const [seconds, fraction] = [data.readUInt32LE(at), data.readUInt32LE(at + 4)];
    const length = data.readUInt32LE(at + 8);
    const packet = data.subarray(at + 16, at + 16 + length);
    at += 16 + length;
    packets++;
    const segment = parseSegment(packet);
    const atMs = seconds * 1000 + fraction / (magic === NANOSECONDS ? 1e6 : 1e3);
    if (typeof segment === 'string') {
      if (segment !== '') others.set(segment, (others.get(segment) ?? 0) + 1);
    } else {
      addSegment(streams, segment, atMs);
    }
    for (const marker of markers) {
      if (!found.has(marker) && packet.includes(marker)) {
        found.set(marker, typeof segment === 'string' ? segment : `${segment.from} -> ${segment.to}`);
      }
    }
  }
  const connections = describe(streams, markers, found);
  return {
    packets,
    connections,
    others: [...others].map(([what, count]) => `${what} (${count} packets)`),
    markersFound: [...found].map(([marker, where]) => ({ marker, where })),
  };
}

interface Segment {
  readonly from: string;
  readonly to: string;
  readonly seq: number;
  readonly syn: boolean;
  readonly ack: boolean;
  readonly payload: Buffer;
}

/** A TCP segment, or a description of what else it is ('' where it is of no interest). */
function parseSegment(packet: Buffer): Segment | string {
  if (packet.length < 14) return 'runt frame';
  const type = packet.readUInt16BE(12);
  if (type === 0x0806) return '';
  let ip = packet.subarray(14);
  let from: string;
  let to: string;
  if (type === 0x0800 && ip.length >= 20) {
    const header = ((ip[0] ?? 0) & 15) * 4;
    const total = ip.readUInt16BE(2);
    if (ip[9] !== 6) return `IPv4 protocol ${ip[9]}`;
    from = ip.subarray(12, 16).join('.');
    to = ip.subarray(16, 20).join('.');
    // Length 0: a packet of more than 64 KiB that was never cut into segments.
    ip = ip.subarray(header, total === 0 ? undefined : total);
  } else if (type === 0x86dd && ip.length >= 40) {
    if (ip[6] === 58 || ip[6] === 0) return '';
    if (ip[6] !== 6) return `IPv6 next header ${ip[6]}`;
    from = `[${hex(ip.subarray(8, 24))}]`;
    to = `[${hex(ip.subarray(24, 40))}]`;
    const length = ip.readUInt16BE(4);
    ip = ip.subarray(40, length === 0 ? undefined : 40 + length);
  } else {
    return `ethertype 0x${type.toString(16)}`;
  }
  if (ip.length < 20) return 'TCP header cut off';
  const flags = ip[13] ?? 0;
  return {
    from: `${from}:${ip.readUInt16BE(0)}`,
    to: `${to}:${ip.readUInt16BE(2)}`,
    seq: ip.readUInt32BE(4),
    syn: (flags & 2) !== 0,
    ack: (flags & 16) !== 0,
    payload: ip.subarray(((ip[12] ?? 0) >> 4) * 4),
  };
}

function hex(address: Buffer): string {
  return address.toString('hex').replace(/(.{4})(?=.)/g, '$1:');
}

function addSegment(streams: Map<string, Stream>, segment: Segment, atMs: number): void {
  const key = `${segment.from}>${segment.to}`;
  let stream = streams.get(key);
  if (stream === undefined || (segment.syn && !segment.ack && stream.bytes > 0)) {
    // A new connection with ports used before: the old one keeps its place under another name.
    if (stream !== undefined) {
      const suffix = `#${streams.size}`;
      streams.set(key + suffix, stream);
      const reverse = streams.get(`${segment.to}>${segment.from}`);
      if (reverse !== undefined) streams.set(`${segment.to}>${segment.from}${suffix}`, reverse);
      streams.delete(`${segment.to}>${segment.from}`);
    }
    stream = {
      startedMs: atMs,
      next: undefined,
      bytes: 0,
      chunks: [],
      kept: 0,
      gap: false,
      syn: false,
      early: new Map(),
    };
    streams.set(key, stream);
  }
  if (segment.syn) {
    stream.syn ||= !segment.ack;
    stream.next = (segment.seq + 1) >>> 0;
  }
  const seq = segment.syn ? (segment.seq + 1) >>> 0 : segment.seq;
  if (segment.payload.length === 0) return;
  stream.bytes += segment.payload.length;
  place(stream, seq, segment.payload);
}

function place(stream: Stream, seq: number, payload: Buffer): void {
  stream.next ??= seq;
  const offset = (seq - stream.next) | 0;
  if (offset > 0) {
    if (stream.early.size < EARLY_LIMIT) stream.early.set(seq, payload);
    else stream.gap = true;
    return;
  }
  const fresh = payload.subarray(-offset);
  if (fresh.length === 0) return;
  stream.next = (stream.next + fresh.length) >>> 0;
  if (stream.kept < HEAD_LIMIT) {
    stream.chunks.push(fresh);
    stream.kept += fresh.length;
  }
  const waiting = stream.early.get(stream.next);
  if (waiting !== undefined) {
    stream.early.delete(stream.next);
    place(stream, stream.next, waiting);
  }
}

function describe(
  streams: Map<string, Stream>,
  markers: readonly string[],
  found: Map<string, string>,
): WireConnection[] {
  const connections: WireConnection[] = [];
  const seen = new Set<string>();
  for (const [key, stream] of streams) {
    if (seen.has(key)) continue;
    const [pair = '', suffix] = key.split('#');
    const [a = '', b = ''] = pair.split('>');
    const reverseKey = `${b}>${a}${suffix === undefined ? '' : `#${suffix}`}`;
    seen.add(reverseKey);
    const reverse = streams.get(reverseKey);
    const forward = stream.syn || !(reverse?.syn ?? false);
    const [client, server] = forward ? [a, b] : [b, a];
    const up = Buffer.concat((forward ? stream : reverse)?.chunks ?? []);
    const down = Buffer.concat((forward ? reverse : stream)?.chunks ?? []);
    for (const marker of markers) {
      if (!found.has(marker) && (up.includes(marker) || down.includes(marker)))
        found.set(marker, `${client} -> ${server}`);
    }
    connections.push({
      client,
      server,
      serverPort: Number(server.slice(server.lastIndexOf(':') + 1)),
      startedMs: Math.min(stream.startedMs, reverse?.startedMs ?? stream.startedMs),
      payloadBytes: stream.bytes + (reverse?.bytes ?? 0),
      protocol: protocolOf(up, down),
    });
  }
  return connections;
}

const HANDSHAKE = 22;
const SUPPORTED_VERSIONS = 43;

/** Names what two directions of a connection hold; the last record of either may be cut off. */
function protocolOf(up: Buffer, down: Buffer): string {
  if (up.length === 0 && down.length === 0) return 'empty';
  for (const side of [up, down]) {
    const problem = notTls(side);
    if (problem !== '') return problem;
  }
  if (down.length === 0) return 'unanswered TLS';
  // A server may answer the first hello with HelloRetryRequest, which has the same shape.
  return down[0] === HANDSHAKE ? serverVersion(down) : 'TLS without ServerHello';
}

function notTls(side: Buffer): string {
  for (let at = 0; at + 5 <= side.length; at += 5 + side.readUInt16BE(at + 3)) {
    const type = side[at] ?? 0;
    const sane = type >= 20 && type <= 23 && side[at + 1] === 3 && side.readUInt16BE(at + 3) <= 16384 + 256;
    if (!sane) return `not TLS at byte ${at}: ${JSON.stringify(side.subarray(at, at + 24).toString('latin1'))}`;
  }
  return '';
}

/** The version of a ServerHello (RFC 8446, 4.1.3 and 4.2.1): TLS 1.3 only where supported_versions says 0x0304. */
function serverVersion(down: Buffer): string {
  const end = Math.min(down.length, 5 + down.readUInt16BE(3));
  // record header 5, handshake header 4, version 2, random 32, session id, cipher suite 2, compression 1
  if (end < 44 || down[5] !== 2) return 'TLS without ServerHello';
  let at = 43 + 1 + (down[43] ?? 0) + 3 + 2;
  while (at + 4 <= end) {
    const type = down.readUInt16BE(at);
    const length = down.readUInt16BE(at + 2);
    if (type === SUPPORTED_VERSIONS && length === 2 && at + 6 <= end) {
      return down.readUInt16BE(at + 4) === 0x0304 ? 'tls1.3' : `TLS version ${down.readUInt16BE(at + 4).toString(16)}`;
    }
    at += 4 + length;
  }
  return 'TLS 1.2 or older';
}
