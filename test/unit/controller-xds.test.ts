/** The controller over a real TLS connection on the loopback: delta xDS and the certificate service. */
import { execFile, execFileSync } from 'node:child_process';
import { X509Certificate } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect as connectHttp2, type IncomingHttpHeaders } from 'node:http2';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { type Client, status } from '@grpc/grpc-js';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type ObjectSource, type RunningController, startController } from '../../src/controller/controller.ts';
import type { AuthorizationPolicy, ClusterObjects, Node, Pod } from '../../src/controller/objects.ts';
import { makeResource } from '../../src/controller/store.ts';
import { XdsServer } from '../../src/controller/xds.ts';
import {
  ADDRESS,
  AUTHORIZATION,
  authorization,
  bearer,
  connect,
  createCertificate,
  summary,
  TestStream,
  versions,
} from '../lib/xds-client.ts';

let directory: string;
let data: string;
let controller: RunningController;
let source: TestSource;
let lines: Record<string, unknown>[];
let clients: Client[];

/** Objects set by the test, as a source hands them on. */
class TestSource implements ObjectSource {
  objects: ClusterObjects;
  changed: ((objects: ClusterObjects) => void) | undefined;

  constructor(objects: ClusterObjects) {
    this.objects = objects;
  }
  async start(changed: (objects: ClusterObjects) => void): Promise<ClusterObjects> {
    this.changed = changed;
    return this.objects;
  }
  set(some: Partial<ClusterObjects>): void {
    this.objects = { ...this.objects, ...some };
    this.changed?.(this.objects);
  }
  locate(): string {
    return 'objects.yaml:1:1';
  }
  close(): void {}
}

const EMPTY: ClusterObjects = {
  namespaces: [],
  nodes: [],
  pods: [],
  services: [],
  endpointSlices: [],
  authorizationPolicies: [],
  peerAuthentications: [],
};
const node = (name: string): Node => ({ metadata: { name } });
const pod = (name: string, ip: string, nodeName = 'n1', labels = {}): Pod => ({
  metadata: { name, namespace: 'shop', labels, uid: name },
  spec: { nodeName, serviceAccountName: name },
  status: { podIP: ip },
});
const uid = (name: string): string => `Kubernetes//Pod/shop/${name}`;
const deny = (name: string): AuthorizationPolicy => ({
  metadata: { name, namespace: 'shop' },
  spec: { selector: { matchLabels: { app: 'db' } }, action: 'DENY', rules: [{}] },
});

async function start(objects: Partial<ClusterObjects>, ttlSeconds = 3600): Promise<void> {
  source = new TestSource({ ...EMPTY, nodes: [node('n1'), node('n2')], ...objects });
  const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
  controller = await startController(
    {
      listen: { host: '127.0.0.1', port: 0 },
      ttlSeconds,
      trustDomain: 'cluster.local',
      clusterDomain: 'cluster.local',
      clusterId: 'Kubernetes',
    },
    { source, log, data, belongsInMesh: () => true },
  );
}

function open(name = 'n1'): TestStream {
  const client = connect(data, controller.port);
  clients.push(client);
  return new TestStream(client, bearer(data, name));
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebE-xds-'));
  data = join(directory, 'data');
  lines = [];
  clients = [];
});
afterEach(async () => {
  for (const client of clients) client.close();
  await controller?.close();
  rmSync(directory, { recursive: true, force: true });
});
const events = (event: string) => lines.filter((line) => line.event === event);

describe('delta xDS', () => {
  test('answers both types, an empty one too', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    stream.subscribe(AUTHORIZATION);
    const first = [await stream.nextAcked(), await stream.nextAcked()];
    expect(first.map(({ typeUrl }) => typeUrl).sort()).toEqual([AUTHORIZATION, ADDRESS]);
    expect(first.flatMap(summary)).toEqual([`+${uid('a')}`]);
    expect(first.flatMap(({ resources }) => resources).every(({ resource }) => resource?.type_url === ADDRESS)).toBe(
      true,
    );
    expect(events('xds_subscribed')[0]).toMatchObject({ node: 'n1', type: expect.any(String) });
  });

  test('pushes only what changed, and removals', async () => {
    await start({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.0.2')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('a')}`, `+${uid('b')}`]);
    source.set({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.0.3')] });
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('b')}`]);
    source.set({ pods: [pod('c', '10.0.0.4'), pod('b', '10.0.0.3')] });
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('c')}`, `-${uid('a')}`]);
    source.set({ pods: [pod('c', '10.0.0.4'), pod('b', '10.0.0.3')] });
    expect(await stream.poll(300)).toBeUndefined();
  });

  test('reconnect with versions: unchanged resources are not sent, what is gone is removed, also after a restart', async () => {
    await start({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.0.2'), pod('c', '10.0.0.3')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    const held = versions(await stream.nextAcked());
    stream.call.cancel();
    await controller.close();
    await start({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.9.9')], authorizationPolicies: [deny('p')] });
    const again = open();
    again.subscribe(ADDRESS, held);
    expect(summary(await again.nextAcked())).toEqual([`+${uid('b')}`, `-${uid('c')}`]);
    again.subscribe(AUTHORIZATION, { 'shop/gone': 'x' });
    expect(summary(await again.nextAcked())).toEqual(['+shop/p']);
    expect(summary(await again.nextAcked())).toEqual(['-shop/gone']);
    const third = open();
    third.subscribe(ADDRESS, { ...held, [uid('b')]: (await versionOf(again, uid('b'))) ?? '', [uid('c')]: '' });
    expect(summary(await third.nextAcked())).toEqual([`-${uid('c')}`]);
  });

  async function versionOf(stream: TestStream, name: string): Promise<string | undefined> {
    stream.send({ typeUrl: ADDRESS, resourceNamesSubscribe: [name] });
    source.set({ pods: [...source.objects.pods, pod('tick', '10.0.0.77')] });
    await stream.nextAcked();
    source.set({ pods: source.objects.pods.slice(0, -1) });
    const probe = open();
    probe.subscribe(ADDRESS);
    return versions(await probe.nextAcked())[name];
  }

  test('a rejected response is logged with node and reason and not sent again', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const stream = open('n2');
    stream.subscribe(ADDRESS);
    stream.nack(await stream.next(), 'a: bad address');
    expect(await stream.poll(300)).toBeUndefined();
    expect(events('xds_rejected')).toMatchObject([{ node: 'n2', reason: 'a: bad address', type: ADDRESS }]);
    source.set({ pods: [pod('a', '10.0.0.2')] });
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('a')}`]);
  });

  test('an old nonce is no answer', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    const first = await stream.nextAcked();
    source.set({ pods: [pod('a', '10.0.0.2')] });
    const second = await stream.next();
    source.set({ pods: [pod('a', '10.0.0.3')] });
    stream.ack(first);
    expect(await stream.poll(300)).toBeUndefined();
    stream.ack(second);
    expect(summary(await stream.next())).toEqual([`+${uid('a')}`]);
  });

  test('a slow client has one response in flight and then gets the latest state at once', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    const first = await stream.next();
    for (let index = 2; index < 12; index++) {
      source.set({ pods: [pod('a', `10.0.0.${index}`), pod(`x${index}`, '10.0.1.1')] });
      await new Promise((resolve) => setTimeout(resolve, 80));
    }
    expect(events('published').length).toBeGreaterThan(5);
    expect(stream.queue).toHaveLength(0);
    stream.ack(first);
    const second = await stream.nextAcked();
    expect(second.resources.map(({ name }) => name).sort()).toEqual([uid('a'), uid('x11')]);
    expect(second.removedResources.every((name) => name.startsWith(uid('x')))).toBe(true);
    expect(await stream.poll(200)).toBeUndefined();
  });

  test('policies come before the workloads that name them, and go after them', async () => {
    await start({ pods: [pod('db', '10.0.0.1', 'n1', { app: 'db' })] });
    const stream = open();
    stream.subscribe(ADDRESS);
    stream.subscribe(AUTHORIZATION);
    await stream.nextAcked();
    await stream.nextAcked();
    source.set({ authorizationPolicies: [deny('p')] });
    const policy = await stream.next();
    expect(summary(policy)).toEqual(['+shop/p']);
    expect(await stream.poll(200)).toBeUndefined();
    stream.ack(policy);
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('db')}`]);
    source.set({ authorizationPolicies: [] });
    const workload = await stream.next();
    expect(summary(workload)).toEqual([`+${uid('db')}`]);
    expect(await stream.poll(200)).toBeUndefined();
    stream.ack(workload);
    expect(summary(await stream.nextAcked())).toEqual(['-shop/p']);
  });

  test('a client that never answers about policies still gets addresses', async () => {
    await start({ pods: [pod('db', '10.0.0.1', 'n1', { app: 'db' })] });
    const stream = open();
    stream.subscribe(AUTHORIZATION);
    await stream.next();
    stream.subscribe(ADDRESS);
    const started = performance.now();
    expect(summary(await stream.next())).toEqual([`+${uid('db')}`]);
    expect(performance.now() - started).toBeLessThan(2000);
  });

  test('on demand: by address with its service and members, by name, and what is not there', async () => {
    const service = {
      metadata: { name: 'web', namespace: 'shop' },
      spec: { clusterIP: '10.96.0.1', selector: { app: 'web' }, ports: [{ port: 80 }] },
    };
    const key = 'shop/web.shop.svc.cluster.local';
    const web = { app: 'web' };
    await start({
      services: [service],
      pods: [pod('a', '10.0.0.1', 'n1', web), pod('b', '10.0.0.2', 'n1', web), pod('c', '10.0.0.3')],
    });
    const stream = open();
    const ask = (...names: string[]) => stream.send({ typeUrl: ADDRESS, resourceNamesSubscribe: names });
    stream.send({ typeUrl: ADDRESS, resourceNamesSubscribe: ['*'], resourceNamesUnsubscribe: ['*'] });
    expect(summary(await stream.nextAcked())).toEqual([]);
    ask('/10.96.0.1');
    const vip = await stream.nextAcked();
    expect(summary(vip)).toEqual([`+${uid('a')}`, `+${uid('b')}`, `+${key}`]);
    expect(vip.resources.find(({ name }) => name === key)?.aliases).toContain('/10.96.0.1');
    ask('/10.0.0.3');
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('c')}`]);
    ask('/10.0.0.99');
    expect(summary(await stream.nextAcked())).toEqual(['-/10.0.0.99']);
    source.set({ pods: [pod('a', '10.0.0.1', 'n1', web), pod('d', '10.0.0.4', 'n1', web), pod('e', '10.0.0.5')] });
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('d')}`, `-${uid('b')}`, `-${uid('c')}`]);
  });

  test.each([
    ['no token', undefined],
    ['wrong token', `Bearer ${'A'.repeat(43)}`],
    ['empty token', 'Bearer '],
    ['another scheme', 'Basic abc'],
  ])('a stream is refused: %s', async (_name, header) => {
    await start({});
    const client = connect(data, controller.port);
    clients.push(client);
    const stream = new TestStream(client, authorization(header));
    stream.subscribe(ADDRESS);
    const error = await stream.failure();
    expect([error.code, error.details]).toEqual([status.UNAUTHENTICATED, 'authentication failure']);
    expect(stream.queue).toEqual([]);
    expect(events('xds_refused')).toHaveLength(1);
  });

  test('the streams of a node end when the node goes; its token is void', async () => {
    await start({});
    const metadata = bearer(data, 'n2');
    const stream = open('n2');
    stream.subscribe(ADDRESS);
    await stream.nextAcked();
    source.set({ nodes: [node('n1')] });
    expect((await stream.failure()).code).toBe(status.UNAUTHENTICATED);
    const client = connect(data, controller.port);
    clients.push(client);
    const again = new TestStream(client, metadata);
    again.subscribe(ADDRESS);
    expect((await again.failure()).code).toBe(status.UNAUTHENTICATED);
  });

  test('stopping ends open streams with a status that means "come again"', async () => {
    await start({});
    const stream = open();
    stream.subscribe(ADDRESS);
    await stream.nextAcked();
    const started = performance.now();
    await controller.close();
    expect((await stream.failure()).code).toBe(status.UNAVAILABLE);
    expect(performance.now() - started).toBeLessThan(3000);
  });

  test('what a policy says badly is logged once, with its place', async () => {
    const bad = { ...deny('bad'), spec: { action: 'ALLOW', rules: [{ to: [{ operation: { ports: ['x'] } }] }] } };
    await start({ authorizationPolicies: [bad] });
    source.set({ pods: [pod('a', '10.0.0.1')] });
    const stream = open();
    stream.subscribe(AUTHORIZATION);
    await stream.nextAcked();
    await expect.poll(() => events('published').length).toBe(2);
    expect(events('object_problem')).toMatchObject([
      { object: 'AuthorizationPolicy shop/bad', file: 'objects.yaml:1:1', reason: expect.stringContaining('"x"') },
    ]);
    source.set({ authorizationPolicies: [] });
    await expect.poll(() => events('object_mended').length).toBe(1);
  });

  test('an exception in building leaves the last good state', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const stream = open();
    stream.subscribe(ADDRESS);
    await stream.nextAcked();
    source.set({ pods: [null as unknown as Pod] });
    await expect.poll(() => events('build_failed').length).toBe(1);
    source.set({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.0.2')] });
    expect(summary(await stream.nextAcked())).toEqual([`+${uid('b')}`]);
  });
});

describe('server certificate', () => {
  test('names the listen address, the loopback and the in-cluster names', async () => {
    await start({});
    // Not the synchronous form: the server that is asked lives in this process.
    const asked = promisify(execFile)(
      'openssl',
      [
        's_client',
        '-connect',
        `127.0.0.1:${controller.port}`,
        '-CAfile',
        join(data, 'root-cert.pem'),
        '-verify_return_error',
        '-verify_hostname',
        'istiod.istio-system.svc',
        '-alpn',
        'h2',
      ],
      { encoding: 'utf8', timeout: 10_000 },
    );
    asked.child.stdin?.end();
    const out = (await asked).stdout;
    expect(out).toContain('Verify return code: 0 (ok)');
    const names = new X509Certificate(out.slice(out.indexOf('-----BEGIN'))).subjectAltName;
    for (const name of [
      'DNS:localhost',
      'IP Address:127.0.0.1',
      'IP Address:0:0:0:0:0:0:0:1',
      'DNS:istiod.istio-system.svc.cluster.local',
      'DNS:ebbtide-controller.ebbtide-system.svc',
    ]) {
      expect(names).toContain(name);
    }
  });
});

describe('CreateCertificate', () => {
  const identity = 'spiffe://cluster.local/ns/shop/sa/a';
  let csr: string;
  const client = (): Client => {
    const made = connect(data, controller.port);
    clients.push(made);
    return made;
  };
  beforeEach(async () => {
    execFileSync(
      'openssl',
      [
        'req',
        '-new',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:P-256',
        '-nodes',
        '-subj',
        '/',
        '-keyout',
        join(directory, 'k'),
        '-out',
        join(directory, 'csr'),
      ],
      { stdio: 'pipe' },
    );
    csr = readFileSync(join(directory, 'csr'), 'utf8');
  });

  test('signs for a pod of the node; OpenSSL verifies', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const chain = await createCertificate(client(), bearer(data, 'n1'), csr, identity, 600);
    expect(chain).toHaveLength(2);
    writeFileSync(join(directory, 'leaf'), chain[0] ?? '');
    execFileSync('openssl', [
      'verify',
      '-x509_strict',
      '-CAfile',
      join(data, 'root-cert.pem'),
      join(directory, 'leaf'),
    ]);
    const leaf = new X509Certificate(chain[0] ?? '');
    expect(leaf.subjectAltName).toBe(`URI:${identity}`);
    expect(Math.round((Date.parse(leaf.validTo) - Date.now()) / 10_000)).toBe(60);
    expect(events('ca_signed')).toMatchObject([{ node: 'n1', namespace: 'shop', serviceAccount: 'a' }]);
  });

  test('the configured lifetime caps what is asked for', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] }, 30);
    const chain = await createCertificate(client(), bearer(data, 'n1'), csr, identity, 86_400);
    const left = Date.parse(new X509Certificate(chain[0] ?? '').validTo) - Date.now();
    expect(left).toBeGreaterThan(20_000);
    expect(left).toBeLessThanOrEqual(30_000);
  });

  test('refusals are opaque, their reason is in the log', async () => {
    const failed = { ...pod('failed', '10.0.0.3'), status: { phase: 'Failed' } };
    const unscheduled = { ...pod('unscheduled', '10.0.0.4'), spec: { serviceAccountName: 'unscheduled' } };
    await start({ pods: [pod('a', '10.0.0.1'), pod('b', '10.0.0.2', 'n2'), failed, unscheduled] });
    const der = Buffer.from(csr.replace(/-----.*-----|\s/g, ''), 'base64');
    der[der.length - 1] = (der[der.length - 1] ?? 0) ^ 1;
    const badSignature = `-----BEGIN CERTIFICATE REQUEST-----\n${der.toString('base64')}\n-----END CERTIFICATE REQUEST-----\n`;
    const own = bearer(data, 'n1');
    const sa = (name: string): string => `spiffe://cluster.local/ns/shop/sa/${name}`;
    const refusals: [string, typeof own, string, string | undefined, RegExp][] = [
      ['no token', authorization(undefined), csr, identity, /no bearer token/],
      ['wrong token', authorization(`Bearer ${'x'.repeat(43)}`), csr, identity, /unknown token/],
      ["another node's pod", own, csr, sa('b'), /no pod of shop\/b is scheduled on node n1/],
      ['the pod asked for by another node', bearer(data, 'n2'), csr, identity, /scheduled on node n2/],
      ['failed pod', own, csr, sa('failed'), /no pod/],
      ['unscheduled pod', own, csr, sa('unscheduled'), /no pod/],
      ['no such account', own, csr, sa('nobody'), /no pod/],
      ['wrong trust domain', own, csr, 'spiffe://evil/ns/shop/sa/a', /trust domain evil/],
      ['no identity', own, csr, undefined, /names no ImpersonatedIdentity/],
      ['no SPIFFE identity', own, csr, 'https://cluster.local/ns/shop/sa/a', /not a SPIFFE/],
      ['a slash at its end', own, csr, `${identity}/`, /not a SPIFFE/],
      ['empty account', own, csr, sa(''), /names no possible/],
      ['odd characters', own, csr, sa('a\nb'), /names no possible/],
      ['bad signature', own, badSignature, identity, /signature/],
      ['garbage', own, 'garbage', identity, /PEM/],
      ['empty request', own, '', identity, /PEM/],
    ];
    const connection = client();
    for (const [name, metadata, request, wanted, reason] of refusals) {
      const error = await createCertificate(connection, metadata, request, wanted).then(
        () => undefined,
        (caught: unknown) => caught as { code: number; details: string },
      );
      expect(error?.code, name).toBe(status.UNAUTHENTICATED);
      expect(error?.details, name).toBe('request authentication failure');
      expect(events('ca_refused').at(-1)?.reason, name).toMatch(reason);
    }
    expect(events('ca_refused')).toHaveLength(refusals.length);
    expect(events('ca_signed')).toHaveLength(0);
  });

  test('without a token a request is refused before its message is read, however long it says it is', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const answer = await beginCall(undefined, 31 << 20);
    expect(answer['grpc-status']).toBe(`${status.UNAUTHENTICATED}`);
    expect(events('ca_refused')).toMatchObject([{ reason: 'no bearer token' }]);
  });

  test('a request with a token waits for its message', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const header = String(bearer(data, 'n1').get('authorization')[0]);
    expect(await beginCall(header, 31 << 20)).toEqual({});
  });

  test('a request that is far longer than any CSR is refused, also with a token', async () => {
    await start({ pods: [pod('a', '10.0.0.1')] });
    const connection = client();
    await expect(createCertificate(connection, bearer(data, 'n1'), 'x'.repeat(65 << 10), identity)).rejects.toThrow(
      /deserializing/,
    );
    await expect(createCertificate(connection, bearer(data, 'n1'), 'x'.repeat(63 << 10), identity)).rejects.toThrow(
      /authentication failure/,
    );
    expect(events('ca_signed')).toHaveLength(0);
  });

  /** Sends the headers of a call and the start of a message; the answer's headers, none where none came in a second. */
  async function beginCall(authorizationHeader: string | undefined, length: number): Promise<IncomingHttpHeaders> {
    const session = connectHttp2(`https://127.0.0.1:${controller.port}`, {
      ca: readFileSync(join(data, 'root-cert.pem')),
      servername: 'localhost',
    });
    try {
      const call = session.request({
        ':method': 'POST',
        ':path': '/istio.v1.auth.IstioCertificateService/CreateCertificate',
        'content-type': 'application/grpc',
        te: 'trailers',
        ...(authorizationHeader === undefined ? {} : { authorization: authorizationHeader }),
      });
      const start = Buffer.alloc(5 + 1000);
      start.writeUInt32BE(length, 1);
      call.write(start);
      return await new Promise((resolve, reject) => {
        call.once('response', resolve);
        call.once('error', reject);
        setTimeout(() => resolve({}), 1000);
      });
    } finally {
      session.destroy();
    }
  }
});

test('the log of changes is bounded: a stream that stays behind is ended, not remembered without end', async () => {
  const ended: string[] = [];
  const server = new XdsServer(pino({ enabled: false }), () => ({ node: 'n1' }));
  const handlers = new Map<string, (value: unknown) => void>();
  const written: Uint8Array[] = [];
  server.handle({
    getPeer: () => 'test',
    metadata: authorization('Bearer x'),
    on: (event: string, handler: (value: unknown) => void) => handlers.set(event, handler),
    write: (bytes: Uint8Array) => written.push(bytes),
    end: () => {},
    emit: (_event: string, error: Error) => ended.push(error.message),
  } as unknown as Parameters<XdsServer['handle']>[0]);
  handlers.get('data')?.({
    typeUrl: AUTHORIZATION,
    resourceNamesSubscribe: [],
    resourceNamesUnsubscribe: [],
    initialResourceVersions: {},
    responseNonce: '',
  });
  expect(written).toHaveLength(1);
  for (let index = 0; index < 20_001; index++) {
    const name = `ns/${index}`;
    const authorizations = new Map([[name, makeResource(name, Buffer.from(name))]]);
    server.publish({ addresses: new Map(), authorizations });
  }
  expect(written).toHaveLength(1);
  handlers.get('data')?.({
    typeUrl: AUTHORIZATION,
    resourceNamesSubscribe: [],
    resourceNamesUnsubscribe: [],
    initialResourceVersions: {},
    responseNonce: nonceOf(written[0]),
  });
  expect(ended).toEqual([expect.stringContaining('too far behind')]);
  expect(server.streams).toBe(0);
});

function nonceOf(bytes: Uint8Array | undefined): string {
  return /[0-9a-f]{8}-1/.exec(Buffer.from(bytes ?? []).toString('latin1'))?.[0] ?? '';
}
