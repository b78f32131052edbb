/**
 * HBONE client by hand: `hbone.ts JSON`. Makes one TLS connection as told, says how it went, and sends requests on it, one
 * after the other. The result is one JSON object on standard output.
 */
import { once } from 'node:events';
import { type ClientHttp2Stream, connect as connectHttp2 } from 'node:http2';
import { connect as connectTcp } from 'node:net';
import { connect as connectTls, type TLSSocket } from 'node:tls';
import type { HboneAnswer, HboneRequest, HboneResult, HboneSpec } from '../hbone.ts';

/** A server that says nothing at all is given up after this long. */
const SILENCE_MS = 15_000;

/** Resolves with the first bytes after the handshake, or with why there are none. */
async function handshake(spec: HboneSpec): Promise<{ result: HboneResult; socket?: TLSSocket }> {
  const { host, port, cert, key, alpn, minVersion, maxVersion } = spec;
  const socket = connectTls({
    host,
    port,
    rejectUnauthorized: false,
    ...(cert === undefined ? {} : { cert, key }),
    ...(alpn === undefined ? {} : { ALPNProtocols: [...alpn] }),
    ...(minVersion === undefined ? {} : { minVersion }),
    ...(maxVersion === undefined ? {} : { maxVersion }),
  });
  return await new Promise((resolve) => {
    const refused = (error: string): void => resolve({ result: { outcome: 'refused', error, answers: [] } });
    socket.on('error', (error: NodeJS.ErrnoException) => refused(error.code ?? error.message));
    socket.once('close', () => refused('closed'));
    socket.setTimeout(SILENCE_MS, () => resolve({ result: { outcome: 'silent', error: '', answers: [] } }));
    // The server's SETTINGS: with TLS 1.3 a client is through its handshake before the server has looked at its certificate.
    socket.once('readable', () => {
      if (socket.readableLength > 0) resolve({ result: { outcome: 'open', error: '', answers: [] }, socket });
    });
  });
}

async function ask(stream: ClientHttp2Stream, request: HboneRequest): Promise<HboneAnswer> {
  const body: Buffer[] = [];
  let status = 0;
  stream.on('response', (headers) => {
    status = Number(headers[':status']);
    if (status === 200 && request.payload !== undefined) stream.end(request.payload);
    else stream.end();
  });
  stream.on('data', (chunk: Buffer) => body.push(chunk));
  stream.setTimeout(SILENCE_MS, () => stream.close());
  try {
    await once(stream, 'close');
    return { status, body: Buffer.concat(body).toString() };
  } catch (error) {
    return { status, body: Buffer.concat(body).toString(), error: (error as NodeJS.ErrnoException).code ?? `${error}` };
  }
}

async function main(spec: HboneSpec): Promise<HboneResult> {
  if (spec.plain !== undefined) {
    const socket = connectTcp(spec.port, spec.host, () => socket.write(spec.plain ?? ''));
    socket.setTimeout(SILENCE_MS, () => socket.destroy());
    let got = '';
    socket.on('data', (chunk) => {
      got += chunk.toString('latin1');
    });
    socket.on('error', () => {});
    await once(socket, 'close').catch(() => {});
    return { outcome: 'refused', error: got.startsWith('\x15') ? 'alert' : got, answers: [] };
  }
  const { result, socket } = await handshake(spec);
  if (socket === undefined || spec.requests === undefined) {
    socket?.destroy();
    return result;
  }
  const session = connectHttp2('https://hbone', { createConnection: () => socket });
  const answers: HboneAnswer[] = [];
  for (const request of spec.requests) {
    const stream = session.request(request.headers, { endStream: false });
    answers.push(await ask(stream, request));
  }
  session.destroy();
  return { ...result, answers };
}

process.stdout.write(`${JSON.stringify(await main(JSON.parse(process.argv[2] ?? '{}') as HboneSpec))}\n`);
process.exit(0);
