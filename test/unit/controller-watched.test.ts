/** A watched list against servers that misbehave as no API server does on demand. */

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { openApi, Watched } from '../../src/mesh/api/index.ts';
import { LineSplitter } from '../../src/mesh/api/lines.ts';

type Handler = (url: URL, response: ServerResponse, request: IncomingMessage) => void;

let directory: string;
let server: Server;
let watched: Watched | undefined;
let onList: Handler;
let onWatch: Handler;
const events: Record<string, unknown>[] = [];
const log = pino({ level: 'debug' }, { write: (line: string) => void events.push(JSON.parse(line)) });

const object = (name: string, version: number) => ({
  metadata: { name, namespace: 'n', resourceVersion: String(version) },
});
const line = (type: string, name: string, version: number): string =>
  `${JSON.stringify({ type, object: object(name, version) })}\n`;
const listOf =
  (version: number, ...names: string[]): Handler =>
  (_url, response) =>
    void response.end(
      JSON.stringify({
        metadata: { resourceVersion: String(version) },
        items: names.map((name) => object(name, version)),
      }),
    );

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'ebC-watch-'));
  writeFileSync(join(directory, 'token'), 'secret');
  events.length = 0;
  server = createServer((request, response) => {
    const url = new URL(request.url ?? '/', 'http://localhost');
    (url.searchParams.has('watch') ? onWatch : onList)(url, response, request);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
});

afterEach(async () => {
  await watched?.close();
  watched = undefined;
  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
  rmSync(directory, { recursive: true, force: true });
});

function watch(silence = 60_000, pick?: (object: { metadata: { name: string } }) => never): Watched {
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  const api = openApi({ server: `http://127.0.0.1:${port}`, serviceAccountDirectory: directory });
  watched = new Watched({
    api,
    path: '/things',
    log,
    changed: () => {},
    times: { silence, maxBackoff: 300 },
    ...(pick ? { pick } : {}),
  });
  return watched;
}

const names = (): string[] => [...(watched?.items().keys() ?? [])].sort();

test('a stream that ends within a line is gone on with from the last whole line', async () => {
  onList = listOf(1, 'a');
  const asked: (string | null)[] = [];
  onWatch = (url, response) => {
    asked.push(url.searchParams.get('resourceVersion'));
    if (asked.length === 1) response.end(line('ADDED', 'b', 2) + line('ADDED', 'c', 3).slice(0, 40));
    else if (asked.length === 2) response.write(line('ADDED', 'c', 3));
  };
  await watch().start();
  await expect.poll(names).toEqual(['n/a', 'n/b', 'n/c']);
  expect(asked).toEqual(['1', '2']);
  expect(watched?.counters).toMatchObject({ lists: 1, broken: 1 });
});

test('a line that is no JSON, again and again, leads to a new list', async () => {
  let lists = 0;
  onList = (url, response, request) => listOf(++lists, ...(lists === 1 ? ['a'] : ['a', 'b']))(url, response, request);
  onWatch = (_url, response) => void response.write('{"type":"ADDED","object":\n');
  await watch().start();
  await expect.poll(names, { timeout: 10_000 }).toEqual(['n/a', 'n/b']);
  expect(watched?.counters.broken).toBeGreaterThanOrEqual(5);
});

test('a server that ends every watch at once is not asked in a circle', async () => {
  onList = listOf(1, 'a');
  onWatch = (_url, response) => void response.end();
  await watch().start();
  await sleep(2000);
  // 200 ms and more between two, the limit of this test being 300 ms.
  expect(watched?.counters.watches).toBeLessThan(20);
  expect(watched?.counters.watches).toBeGreaterThan(3);
});

test('an ERROR event of 410 leads to a new list, another one to another watch', async () => {
  let lists = 0;
  let watches = 0;
  onList = (url, response, request) => listOf(10 * ++lists, ...(lists === 1 ? ['a'] : ['b']))(url, response, request);
  onWatch = (_url, response) => {
    const code = ++watches === 1 ? 500 : 410;
    if (watches <= 2)
      response.write(`${JSON.stringify({ type: 'ERROR', object: { code, reason: 'x', message: 'y' } })}\n`);
    else response.write(line('ADDED', 'c', 30));
  };
  await watch().start();
  await expect.poll(names).toEqual(['n/b', 'n/c']);
  expect(watched?.counters).toMatchObject({ lists: 2, watches: 3, expired: 1 });
});

test('a bookmark moves the version on', async () => {
  onList = listOf(1, 'a');
  const asked: (string | null)[] = [];
  onWatch = (url, response) => {
    asked.push(url.searchParams.get('resourceVersion'));
    expect(url.searchParams.get('allowWatchBookmarks')).toBe('true');
    if (asked.length === 1) response.end(line('BOOKMARK', '', 99));
  };
  await watch().start();
  await expect.poll(() => asked).toEqual(['1', '99']);
  expect(names()).toEqual(['n/a']);
});

test('a list that is cut off, or is none, changes nothing', async () => {
  let lists = 0;
  onWatch = (_url, response) => void response.writeHead(410).end('{}');
  onList = (url, response, request) => {
    lists++;
    if (lists === 1) listOf(1, 'a')(url, response, request);
    else if (lists === 2) response.end('{"metadata":{"resourceVersion":"5"},"items":[');
    else if (lists === 3) response.end('"hello"');
    else if (lists === 4)
      response.writeHead(200, { 'Content-Length': 1000 }).end('{"items":[]', () => response.destroy());
    else if (lists === 5) response.writeHead(503).end('nothing here');
    else {
      expect(names()).toEqual(['n/a']);
      listOf(9, 'b')(url, response, request);
    }
  };
  await watch().start();
  await expect.poll(names, { timeout: 10_000 }).toEqual(['n/b']);
});

test('an object that cannot be reduced does not stop the others', async () => {
  onList = listOf(1, 'a', 'bad');
  onWatch = (_url, response) => void response.write(line('ADDED', 'bad', 2) + line('ADDED', 'c', 3));
  const pick = (one: { metadata: { name: string } }): never => {
    if (one.metadata.name === 'bad') throw new Error('no such thing');
    return one as never;
  };
  await watch(60_000, pick).start();
  await expect.poll(names).toEqual(['n/a', 'n/c']);
  expect(events.filter(({ event }) => event === 'object_unreadable')).toHaveLength(2);
});

test('a slow server that dribbles bytes is not taken for silent; one that stops is', async () => {
  onList = listOf(1, 'a');
  const text = line('ADDED', 'b', 2);
  onWatch = async (_url, response) => {
    for (const character of text) {
      response.write(character);
      await sleep(10);
    }
  };
  await watch(700).start();
  await expect.poll(names, { timeout: 10_000 }).toEqual(['n/a', 'n/b']);
  expect(watched?.counters.silences).toBe(0);
  await expect.poll(() => watched?.counters.silences, { timeout: 10_000 }).toBeGreaterThan(0);
});

test('requests fail with what the server said, or that it said nothing, in time', async () => {
  const { api } = {
    api: openApi({
      server: `http://127.0.0.1:${(server.address() as { port: number }).port}`,
      serviceAccountDirectory: directory,
    }),
  };
  onList = (url, response, request) => {
    if (url.pathname === '/silent') return;
    if (url.pathname === '/proxy') return void response.writeHead(502).end('<html>bad gateway</html>');
    expect(request.headers.authorization).toBe('Bearer secret');
    response.writeHead(409).end(JSON.stringify({ kind: 'Status', reason: 'AlreadyExists', message: 'it is there' }));
  };
  onWatch = () => {};
  await expect(api.request('POST', '/x', { body: {} })).rejects.toMatchObject({ status: 409, reason: 'AlreadyExists' });
  await expect(api.request('GET', '/proxy')).rejects.toMatchObject({
    status: 502,
    message: expect.stringContaining('bad gateway'),
  });
  await expect(api.request('GET', '/silent', { timeoutMs: 200 })).rejects.toMatchObject({
    status: 0,
    reason: 'Timeout',
  });
  const stop = new AbortController();
  setTimeout(() => stop.abort(), 50);
  await expect(api.request('GET', '/silent', { signal: stop.signal })).rejects.toMatchObject({ reason: 'Aborted' });
});

test('lines are cut right wherever chunks end, and none is without end', () => {
  const bytes = Buffer.from('één\n\ntwee€\ndrie');
  for (let cut = 0; cut <= bytes.length; cut++) {
    const lines = new LineSplitter(100);
    expect([...lines.push(bytes.subarray(0, cut)), ...lines.push(bytes.subarray(cut))]).toEqual(['één', '', 'twee€']);
    expect(lines.pending).toBe(4);
  }
  expect(() => new LineSplitter(3).push(Buffer.from('long'))).toThrow(/longer than 3/);
});
