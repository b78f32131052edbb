/**
 * Many xDS clients in one process, as light as can be: TLS, HTTP/2, frames read by hand, so that it is the controller that
 * is measured. Arguments: port, roots, first node, number. Answers commands on standard input with a line of JSON each:
 * `ready` once all are told everything, `reset`, `report`.
 */
import { readFileSync } from 'node:fs';
import { type ClientHttp2Session, connect } from 'node:http2';
import { createInterface } from 'node:readline';
import type { envoy } from '../../../src/mesh/proto/generated.js';

// What is built, because the sources name each other as what they are built to.
const BUILT: string = '../../../dist/mesh/proto/generated.js';
const generated = (await import(BUILT)) as typeof import('../../../src/mesh/proto/generated.js');

const { DeltaDiscoveryRequest, DeltaDiscoveryResponse } = generated.envoy.service.discovery.v3;
const { Address } = generated.istio.workload;
const { Authorization } = generated.istio.security;
const ADDRESS = 'type.googleapis.com/istio.workload.Address';
const AUTHORIZATION = 'type.googleapis.com/istio.security.Authorization';
const PATH = '/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources';
/** A response that is larger is a whole state; only its nonce is of interest. */
const WHOLE_BYTES = 1 << 20;

const [port = '', roots = '', first = '0', count = '0'] = process.argv.slice(2);
const ca = readFileSync(roots);
const sessions: ClientHttp2Session[] = [];

let ready = 0;
let failed = 0;
let wholeBytes = 0;
let bytes = 0;
let responses = 0;
let latencies: number[] = [];
/** By the time of the change: when the last of our clients had it, and how many did. */
let last = new Map<number, { at: number; clients: number }>();

const now = (): number => performance.timeOrigin + performance.now();

function frame(message: Uint8Array): Buffer {
  const head = Buffer.alloc(5);
  head.writeUInt32BE(message.length, 1);
  return Buffer.concat([head, message]);
}

/** Nonce and type of a response, without decoding its resources. */
function skim(message: Buffer): { nonce: string; type: string } {
  let offset = 0;
  const varint = (): number => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = message[offset++] ?? 0;
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
  };
  const found = { nonce: '', type: '' };
  while (offset < message.length) {
    const field = varint() >> 3;
    const length = varint();
    if (field === 4) found.type = message.toString('utf8', offset, offset + length);
    if (field === 5) found.nonce = message.toString('utf8', offset, offset + length);
    offset += length;
  }
  return found;
}

function note(stamp: string, arrived: number): void {
  const at = Number(/^at-(\d+\.\d+)$/.exec(stamp)?.[1]);
  if (!(at > 0)) return;
  latencies.push(arrived - at);
  const entry = last.get(at) ?? { at: 0, clients: 0 };
  last.set(at, { at: Math.max(entry.at, arrived), clients: entry.clients + 1 });
}

function open(node: number): void {
  // Windows as a gRPC client has them that sets none.
  const session = connect(`https://localhost:${port}`, { ca });
  sessions.push(session);
  session.on('error', () => failed++);
  const stream = session.request({
    ':method': 'POST',
    ':path': PATH,
    'content-type': 'application/grpc',
    te: 'trailers',
    authorization: `Bearer node-${node}`,
  });
  stream.on('error', () => failed++);
  const send = (request: envoy.service.discovery.v3.DeltaDiscoveryRequest.$Properties): void =>
    void stream.write(frame(DeltaDiscoveryRequest.encode(request).finish()));
  const seen = new Set<string>();
  const receive = (message: Buffer): void => {
    const arrived = now();
    const { nonce, type } = skim(message);
    send({ typeUrl: type, responseNonce: nonce });
    if (!seen.has(type)) {
      seen.add(type);
      wholeBytes += message.length;
      if (seen.size === 2) ready++;
      return;
    }
    bytes += message.length + 5;
    responses++;
    if (message.length > WHOLE_BYTES) return;
    const response = DeltaDiscoveryResponse.decode(message);
    for (const { resource } of response.resources ?? []) {
      const value = resource?.value ?? new Uint8Array();
      if (type === ADDRESS) note(Address.decode(value).workload?.canonicalRevision ?? '', arrived);
      else note(Authorization.decode(value).name, arrived);
    }
  };
  let kept: Buffer[] = [];
  let size = 0;
  stream.on('data', (chunk: Buffer) => {
    kept.push(chunk);
    size += chunk.length;
    while (size >= 5) {
      let head = kept[0] ?? Buffer.alloc(0);
      if (head.length < 5) {
        head = Buffer.concat(kept);
        kept = [head];
      }
      const length = head.readUInt32BE(1);
      if (size < length + 5) return;
      const all = kept.length === 1 ? head : Buffer.concat(kept);
      receive(all.subarray(5, length + 5));
      const rest = all.subarray(length + 5);
      kept = rest.length > 0 ? [rest] : [];
      size = rest.length;
    }
  });
  send({ typeUrl: ADDRESS, node: { id: `ztunnel~1.1.1.1~proxy-${node}.istio-system~istio-system.svc.cluster.local` } });
  send({ typeUrl: AUTHORIZATION });
}

for (let node = Number(first); node < Number(first) + Number(count); node++) open(node);

const answer = (object: object): void => void process.stdout.write(`${JSON.stringify(object)}\n`);
createInterface(process.stdin).on('line', (line) => {
  if (line === 'ready') answer({ ready, failed, wholeBytes });
  else if (line === 'reset') {
    [bytes, responses, latencies, last] = [0, 0, [], new Map()];
    answer({});
  } else if (line === 'report') {
    answer({
      bytes,
      responses,
      failed,
      latencies,
      last: [...last].map(([at, { at: end, clients }]) => [end - at, clients]),
    });
  }
});
process.stdin.on('end', () => process.exit(0));
