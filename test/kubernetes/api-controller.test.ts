/** The controller on a real API server: what it serves, whom it lets in, whom it signs for, what it writes. */
import { generateKeyPairSync, X509Certificate } from 'node:crypto';
import { rmSync } from 'node:fs';
import { Client, credentials, status } from '@grpc/grpc-js';
import { pino } from 'pino';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type ClusterController, startClusterController } from '../../src/controller/cluster/run.js';
import type { ClusterSettings } from '../../src/controller/settings.js';
import { waitFor } from '../../src/lab/wait.js';
import { ApiError } from '../../src/mesh/api/index.js';
import { istio } from '../../src/mesh/proto/generated.js';
import { ADDRESS, AUTHORIZATION, authorization, createCertificate, TestStream } from '../lib/xds-client.js';
import { type ApiServer, startApiServer } from './lib/api-server.js';
import {
  deletePod,
  installDefinitions,
  type MadePod,
  makeNamespace,
  makeNode,
  makePod,
  makeServiceAccount,
  pathOf,
  putCustom,
  setPodStatus,
} from './lib/cluster-objects.js';
import { makeRequest } from './lib/requests.js';

const WAIT = { timeoutMs: 60_000 };
const SYSTEM = 'istio-system';

let server: ApiServer;
const lines: Record<string, unknown>[] = [];
const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
const controllers: ClusterController[] = [];
const clients: Client[] = [];
let proxies: { readonly n1: MadePod; readonly n2: MadePod };

function settings(overrides: Partial<ClusterSettings> = {}): ClusterSettings {
  return {
    listen: { host: '127.0.0.1', port: 0 },
    ttlSeconds: 3600,
    trustDomain: 'cluster.local',
    clusterDomain: 'cluster.local',
    clusterId: 'Kubernetes',
    access: { kubeconfig: server.kubeconfig() },
    namespace: SYSTEM,
    identity: `replica-${Math.random()}`,
    trustedAccounts: new Set([`${SYSTEM}/ebbtide-proxy`, `${SYSTEM}/ztunnel`]),
    ...overrides,
  };
}

async function start(overrides: Partial<ClusterSettings> = {}): Promise<ClusterController> {
  const times = {
    watch: { maxBackoff: 500, absent: 300 },
    lease: { durationMs: 3000, deadlineMs: 2000, retryMs: 300 },
    retryMs: 500,
  };
  const controller = await startClusterController(settings(overrides), log, undefined, times);
  controllers.push(controller);
  return controller;
}

/** A client that trusts what the controller distributes. */
function connect(controller: ClusterController): Client {
  const roots = credentials.createSsl(Buffer.from(controller.authority.bundle));
  const client = new Client(`localhost:${controller.port}`, roots);
  clients.push(client);
  return client;
}

const proxyToken = (pod: MadePod, account = 'ebbtide-proxy', audiences: readonly string[] = ['istio-ca']) =>
  server.token(SYSTEM, account, { audiences, pod });
const bearer = (token: string) => authorization(`Bearer ${token}`);

/** What a wildcard client holds, kept up to date. */
class Mirror {
  readonly workloads = new Map<string, NonNullable<istio.workload.Address['workload']>>();
  readonly services = new Map<string, NonNullable<istio.workload.Address['service']>>();
  readonly policies = new Map<string, istio.security.Authorization>();
  readonly stream: TestStream;

  constructor(client: Client, token: string) {
    this.stream = new TestStream(client, bearer(token));
    this.stream.call.on('data', (response) => {
      for (const { name, resource } of response.resources) {
        if (response.typeUrl === ADDRESS) {
          const { workload, service } = istio.workload.Address.decode(resource.value);
          if (workload) this.workloads.set(name, workload);
          if (service) this.services.set(name, service);
        } else this.policies.set(name, istio.security.Authorization.decode(resource.value));
      }
      for (const name of response.removedResources) {
        this.workloads.delete(name);
        this.services.delete(name);
        this.policies.delete(name);
      }
      this.stream.ack(response);
    });
    this.stream.subscribe(ADDRESS);
    this.stream.subscribe(AUTHORIZATION);
  }
}

beforeAll(async () => {
  server = await startApiServer();
  await makeNamespace(server, SYSTEM);
  for (const account of ['ebbtide-proxy', 'ztunnel', 'other']) await makeServiceAccount(server, SYSTEM, account);
  await makeNode(server, 'n1', { 'topology.kubernetes.io/region': 'r', 'topology.kubernetes.io/zone': 'z1' });
  await makeNode(server, 'n2');
  proxies = {
    n1: await makePod(server, SYSTEM, 'proxy-1', { node: 'n1', serviceAccount: 'ebbtide-proxy' }),
    n2: await makePod(server, SYSTEM, 'proxy-2', { node: 'n2', serviceAccount: 'ebbtide-proxy' }),
  };
  await makeNamespace(server, 'shop', { 'istio.io/dataplane-mode': 'ambient' });
  await makeServiceAccount(server, 'shop', 'db');
  await makeServiceAccount(server, 'shop', 'web');
});

afterEach(async () => {
  for (const client of clients.splice(0)) client.close();
  await Promise.all(controllers.splice(0).map((controller) => controller.close()));
  await server.api
    .request('DELETE', `/apis/coordination.k8s.io/v1/namespaces/${SYSTEM}/leases/ebbtide-controller`)
    .catch(() => {});
});

afterAll(async () => {
  await server?.close();
});

describe('what is served', () => {
  it('serves pods, services and, once their kinds exist, policies and entries', async () => {
    const controller = await start();
    await makePod(server, 'shop', 'db-0', {
      node: 'n1',
      ip: '10.0.0.1',
      serviceAccount: 'db',
      labels: { app: 'db' },
      annotations: { 'ambient.istio.io/redirection': 'enabled' },
    });
    await makePod(server, 'shop', 'web-0', {
      node: 'n2',
      ip: '10.0.0.2',
      serviceAccount: 'web',
      labels: { app: 'web' },
      // Of a mesh without a cluster; here anybody could write it.
      annotations: { 'ebbtide.dev/netns': '/run/netns/web' },
    });
    await server.api.request('POST', '/api/v1/namespaces/shop/services', {
      body: { metadata: { name: 'db' }, spec: { selector: { app: 'db' }, ports: [{ port: 5432, targetPort: 'web' }] } },
    });
    const mirror = new Mirror(connect(controller), await proxyToken(proxies.n1));
    const uid = 'Kubernetes//Pod/shop/db-0';
    const service = 'shop/db.shop.svc.cluster.local';
    await waitFor('the pod and its service', () => mirror.workloads.has(uid) && mirror.services.has(service), WAIT);
    const workload = mirror.workloads.get(uid);
    expect(workload).toMatchObject({ tunnelProtocol: 1, serviceAccount: 'db', node: 'n1', status: 0 });
    expect(workload?.locality).toMatchObject({ region: 'r', zone: 'z1' });
    expect(workload?.services?.[service]?.ports).toMatchObject([{ servicePort: 5432, targetPort: 8080 }]);
    expect(mirror.workloads.get('Kubernetes//Pod/shop/web-0')?.tunnelProtocol).toBe(0);

    await installDefinitions(server);
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'only-web', {
      selector: { matchLabels: { app: 'db' } },
      action: 'ALLOW',
      rules: [{ from: [{ source: { serviceAccounts: ['shop/web'] } }] }],
    });
    await putCustom(server, 'PeerAuthentication', 'shop', 'strict', { mtls: { mode: 'STRICT' } });
    await putCustom(server, 'ServiceEntry', 'shop', 'ledger', {
      hosts: ['ledger.example'],
      addresses: ['240.0.0.9'],
      ports: [{ number: 80, name: 'http', protocol: 'HTTP', targetPort: 8080 }],
      resolution: 'STATIC',
      endpoints: [{ address: '192.0.2.9', ports: { http: 9080 }, labels: { app: 'ledger' } }],
    });
    await putCustom(server, 'ServiceEntry', 'shop', 'machines', {
      hosts: ['machines.example'],
      addresses: ['240.0.0.10'],
      ports: [{ number: 22, name: 'ssh', protocol: 'TCP' }],
      resolution: 'STATIC',
      workloadSelector: { labels: { role: 'machine' } },
    });
    await putCustom(server, 'WorkloadEntry', 'shop', 'm1', {
      address: '192.0.2.20',
      labels: { role: 'machine' },
      serviceAccount: 'machine',
      ports: { ssh: 2222 },
    });
    const entry = 'Kubernetes/networking.istio.io/WorkloadEntry/shop/m1';
    const inline = 'Kubernetes/networking.istio.io/ServiceEntry/shop/ledger/192.0.2.9';
    await waitFor(
      'entries and policies',
      () =>
        mirror.workloads.has(entry) &&
        mirror.workloads.has(inline) &&
        mirror.workloads.get(uid)?.authorizationPolicies?.length === 2,
      WAIT,
    );
    expect(mirror.workloads.get(uid)?.authorizationPolicies).toEqual([
      'istio-system/istio_converted_static_strict',
      'shop/only-web',
    ]);
    expect(mirror.policies.has('shop/only-web')).toBe(true);
    expect(mirror.services.get('shop/ledger.example')?.addresses?.[0]?.address).toEqual(Buffer.from([240, 0, 0, 9]));
    expect(mirror.workloads.get(inline)?.services?.['shop/ledger.example']?.ports).toMatchObject([
      { servicePort: 80, targetPort: 9080 },
    ]);
    expect(mirror.workloads.get(entry)).toMatchObject({ serviceAccount: 'machine', tunnelProtocol: 0 });
    expect(mirror.workloads.get(entry)?.services?.['shop/machines.example']?.ports).toMatchObject([
      { servicePort: 22, targetPort: 2222 },
    ]);

    // A pod that has ended is no workload, whatever its address says; and one that is no more.
    await setPodStatus(server, 'shop', 'web-0', { phase: 'Succeeded' });
    await waitFor('the ended pod to be gone', () => !mirror.workloads.has('Kubernetes//Pod/shop/web-0'), WAIT);
    await deletePod(server, 'shop', 'web-0');
    await deletePod(server, 'shop', 'db-0');
    await waitFor('the deleted pod to be gone', () => !mirror.workloads.has(uid), WAIT);
  });

  it('goes on serving while the API is away, and catches up', async () => {
    const controller = await start();
    await makePod(server, 'shop', 'db-1', { node: 'n1', ip: '10.0.1.1', serviceAccount: 'db' });
    const token = await proxyToken(proxies.n1);
    const first = new Mirror(connect(controller), token);
    const uid = 'Kubernetes//Pod/shop/db-1';
    await waitFor('the pod', () => first.workloads.has(uid), WAIT);
    await server.stopServer('SIGKILL');
    const second = new Mirror(connect(controller), token);
    await waitFor('a new stream to be served what is known', () => second.workloads.has(uid), WAIT);
    expect(first.stream.error).toBeUndefined();
    await server.startServer();
    await makePod(server, 'shop', 'db-2', { node: 'n1', ip: '10.0.1.2', serviceAccount: 'db' });
    await waitFor(
      'both streams to catch up',
      () => first.workloads.has('Kubernetes//Pod/shop/db-2') && second.workloads.has('Kubernetes//Pod/shop/db-2'),
      WAIT,
    );
    await deletePod(server, 'shop', 'db-1');
    await deletePod(server, 'shop', 'db-2');
  });
});

describe('who is let in and signed for', () => {
  it("signs for a pod of the caller's node only, by each rule", async () => {
    const controller = await start();
    const client = connect(controller);
    const identity = 'spiffe://cluster.local/ns/shop/sa/db';
    await makePod(server, 'shop', 'db-3', { node: 'n1', ip: '10.0.2.3', serviceAccount: 'db' });
    const good = await proxyToken(proxies.n1);
    const ask = (token: string | undefined, wanted: string | undefined = identity) =>
      createCertificate(
        client,
        authorization(token === undefined ? undefined : `Bearer ${token}`),
        makeRequest(),
        wanted,
      );
    const chain = await waitFor('a certificate', () => ask(good), WAIT);
    const leaf = new X509Certificate(chain[0] ?? '');
    expect(leaf.subjectAltName).toBe(`URI:${identity}`);
    expect(leaf.verify(new X509Certificate(chain.at(-1) ?? '').publicKey)).toBe(true);

    // A ztunnel's service account is trusted as well.
    const ztunnel = await makePod(server, SYSTEM, 'zt-1', { node: 'n1', serviceAccount: 'ztunnel' });
    const other = await makePod(server, SYSTEM, 'other-1', { node: 'n1', serviceAccount: 'other' });
    const application = await makePod(server, 'shop', 'app-1', { node: 'n1', serviceAccount: 'db' });
    const ztunnelToken = await proxyToken(ztunnel, 'ztunnel');
    await waitFor('a certificate for a ztunnel', () => ask(ztunnelToken), WAIT);

    const doomed = await makePod(server, SYSTEM, 'doomed', { node: 'n1', serviceAccount: 'ebbtide-proxy' });
    const doomedToken = await proxyToken(doomed);
    await waitFor('a certificate for the doomed', () => ask(doomedToken), WAIT);
    await deletePod(server, SYSTEM, 'doomed');
    await waitFor(
      'the doomed to be refused',
      () =>
        ask(doomedToken).then(
          () => false,
          () => true,
        ),
      WAIT,
    );
    // Another pod of the same name does not make the old token good again.
    await makePod(server, SYSTEM, 'doomed', { node: 'n1', serviceAccount: 'ebbtide-proxy' });

    const ended = await makePod(server, 'shop', 'job', { node: 'n2', serviceAccount: 'web' });
    const n2 = await proxyToken(proxies.n2);
    await waitFor('a certificate for the job', () => ask(n2, 'spiffe://cluster.local/ns/shop/sa/web'), WAIT);
    await setPodStatus(server, 'shop', ended.name, { phase: 'Succeeded' });
    await waitFor(
      'the job to have ended',
      () =>
        ask(n2, 'spiffe://cluster.local/ns/shop/sa/web').then(
          () => false,
          () => true,
        ),
      WAIT,
    );

    const refusals: readonly (readonly [string, string | undefined, string | undefined, RegExp])[] = [
      ['no token', undefined, identity, /no bearer token/],
      ['nonsense', 'nonsense', identity, /does not know the token/],
      [
        "the administrator's token",
        server.adminToken,
        identity,
        /does not know the token|not of audience|no service account/,
      ],
      [
        'another audience',
        await proxyToken(proxies.n1, 'ebbtide-proxy', ['https://kubernetes.default.svc']),
        identity,
        /does not know the token|audience/,
      ],
      ['an untrusted service account', await proxyToken(other, 'other'), identity, /not one of node proxies/],
      [
        'the pod itself',
        await server.token('shop', 'db', { audiences: ['istio-ca'], pod: application }),
        identity,
        /not one of node proxies/,
      ],
      [
        'a token that is bound to no pod',
        await server.token(SYSTEM, 'ebbtide-proxy', { audiences: ['istio-ca'] }),
        identity,
        /not bound to a pod/,
      ],
      ['a pod that was replaced', doomedToken, identity, /another one|does not know the token/],
      ['a pod of another node', await proxyToken(proxies.n2), identity, /no pod of shop\/db is scheduled on node n2/],
      ['a pod that has ended', n2, 'spiffe://cluster.local/ns/shop/sa/web', /no pod of shop\/web/],
      ["nobody's service account", good, 'spiffe://cluster.local/ns/shop/sa/nobody', /no pod of shop\/nobody/],
      ['another trust domain', good, 'spiffe://evil/ns/shop/sa/db', /trust domain/],
      ['no SPIFFE identity', good, 'https://shop/db', /not a SPIFFE identity/],
      ['no identity', good, undefined, /names no ImpersonatedIdentity/],
    ];
    for (const [what, token, wanted, reason] of refusals) {
      const before = lines.length;
      const metadata = authorization(token === undefined ? undefined : `Bearer ${token}`);
      const failure = await createCertificate(client, metadata, makeRequest(), wanted).then(
        () => undefined,
        (error: { code: number; details: string }) => error,
      );
      expect(failure?.code, what).toBe(status.UNAUTHENTICATED);
      expect(failure?.details, what).toBe('request authentication failure');
      const told = lines.slice(before).filter(({ event }) => event === 'ca_refused');
      expect(told.map(({ reason: said }) => said).join(), what).toMatch(reason);
    }
    for (const name of ['db-3', 'app-1', 'job']) await deletePod(server, 'shop', name);
    for (const name of ['zt-1', 'other-1', 'doomed']) await deletePod(server, SYSTEM, name);
  });

  it('lets node proxies only open streams, and ends the stream of a proxy whose pod is no more', async () => {
    const controller = await start();
    const client = connect(controller);
    const application = await makePod(server, 'shop', 'app-2', { node: 'n1', serviceAccount: 'db' });
    for (const token of ['nonsense', await server.token('shop', 'db', { audiences: ['istio-ca'], pod: application })]) {
      const stream = new TestStream(client, bearer(token));
      stream.subscribe(ADDRESS);
      expect((await stream.failure()).code).toBe(status.UNAUTHENTICATED);
    }
    const doomed = await makePod(server, SYSTEM, 'doomed-2', { node: 'n1', serviceAccount: 'ebbtide-proxy' });
    const token = await proxyToken(doomed);
    const stream = await waitFor(
      'the stream of a new proxy',
      async () => {
        const candidate = new TestStream(client, bearer(token));
        candidate.subscribe(ADDRESS);
        return (await candidate.poll(5000)) === undefined ? undefined : candidate;
      },
      WAIT,
    );
    await deletePod(server, SYSTEM, 'doomed-2');
    expect((await stream.failure()).code).toBe(status.UNAUTHENTICATED);
    await deletePod(server, 'shop', 'app-2');
  });

  it('signs nothing while it cannot have tokens reviewed, and says that it may be asked again', async () => {
    const controller = await start();
    const token = await proxyToken(proxies.n1);
    const client = connect(controller);
    await server.stopServer('SIGKILL');
    const failure = await createCertificate(
      client,
      bearer(token),
      makeRequest(),
      'spiffe://cluster.local/ns/x/sa/y',
    ).then(
      () => undefined,
      (error: { code: number }) => error.code,
    );
    expect(failure).toBe(status.UNAVAILABLE);
    await server.startServer();
  });
});

describe('what is written', () => {
  const configMap = (namespace: string) =>
    server.api.request<{ metadata: { labels?: Record<string, string> }; data?: Record<string, string> }>(
      'GET',
      `/api/v1/namespaces/${namespace}/configmaps/istio-ca-root-cert`,
    );
  const bundleIn = (namespace: string): Promise<string | undefined> =>
    configMap(namespace).then(
      ({ data }) => data?.['root-cert.pem'],
      (error: unknown) => {
        if (error instanceof ApiError && error.status === 404) return undefined;
        throw error;
      },
    );

  it('publishes the root to every namespace, also new ones, and repairs what is changed or removed', async () => {
    const controller = await start();
    const { bundle } = controller.authority;
    await waitFor('the root in shop', async () => (await bundleIn('shop')) === bundle, WAIT);
    expect((await configMap('shop')).metadata.labels).toEqual({ 'istio.io/config': 'true' });
    await makeNamespace(server, 'late');
    await waitFor('the root in a new namespace', async () => (await bundleIn('late')) === bundle, WAIT);
    const path = '/api/v1/namespaces/shop/configmaps/istio-ca-root-cert';
    await server.api.request('PATCH', path, { body: { data: { 'root-cert.pem': 'evil' } } });
    await waitFor('the repair of a change', async () => (await bundleIn('shop')) === bundle, WAIT);
    await server.api.request('DELETE', path);
    await waitFor('the repair of a removal', async () => (await bundleIn('shop')) === bundle, WAIT);
    for (const namespace of ['kube-public', 'kube-node-lease']) expect(await bundleIn(namespace)).toBeUndefined();
  });

  it('tells in the status of each policy what became of it, once, and keeps the conditions of others', async () => {
    await installDefinitions(server).catch(() => {});
    await start();
    const read = async (kind: 'AuthorizationPolicy' | 'PeerAuthentication', name: string) => {
      const object = await server.api.request<{
        metadata: { resourceVersion: string };
        status?: {
          conditions?: { type: string; status: string; reason: string; message: string; observedGeneration: number }[];
        };
      }>('GET', pathOf(kind, 'shop', name));
      return { version: object.metadata.resourceVersion, conditions: object.status?.conditions ?? [] };
    };
    const spoken = async (kind: 'AuthorizationPolicy' | 'PeerAuthentication', name: string): Promise<string[]> =>
      (await read(kind, name)).conditions.map(({ type, status, reason }) => `${type} ${status} ${reason}`).sort();
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'whole', {
      rules: [{ to: [{ operation: { ports: ['80'] } }] }],
    });
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'part', {
      action: 'DENY',
      rules: [{ to: [{ operation: { ports: ['80'], methods: ['GET'] } }] }],
    });
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'none', { action: 'CUSTOM', rules: [{}] });
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'broken', { action: 'DENY', rules: 'all' });
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'waypoint', {
      targetRefs: [{ kind: 'Service', group: '', name: 'db' }],
      rules: [{}],
    });
    await putCustom(server, 'PeerAuthentication', 'shop', 'second', { mtls: { mode: 'STRICT' } });
    const expected: readonly (readonly ['AuthorizationPolicy' | 'PeerAuthentication', string, readonly string[]])[] = [
      ['AuthorizationPolicy', 'whole', ['ZtunnelAccepted True Accepted', 'ebbtide.dev/Enforced True Enforced']],
      [
        'AuthorizationPolicy',
        'part',
        ['ZtunnelAccepted True PartiallyInvalid', 'ebbtide.dev/Enforced False PartlyEnforced'],
      ],
      [
        'AuthorizationPolicy',
        'none',
        ['ZtunnelAccepted False UnsupportedValue', 'ebbtide.dev/Enforced False NotEnforced'],
      ],
      [
        'AuthorizationPolicy',
        'broken',
        ['ZtunnelAccepted True PartiallyInvalid', 'ebbtide.dev/Enforced False PartlyEnforced'],
      ],
      ['AuthorizationPolicy', 'waypoint', ['ebbtide.dev/Enforced False NotForNodeProxies']],
    ];
    for (const [kind, name, wanted] of expected) {
      await waitFor(
        `the status of ${name}`,
        async () => JSON.stringify(await spoken(kind, name)) === JSON.stringify(wanted),
        {
          ...WAIT,
          hint: () => JSON.stringify(lines.filter(({ event }) => event === 'status_failed').slice(-2)),
        },
      );
    }
    await waitFor(
      'the status of strict',
      async () => (await spoken('PeerAuthentication', 'second')).length === 1,
      WAIT,
    );
    const part = (await read('AuthorizationPolicy', 'part')).conditions.find(({ type }) => type === 'ZtunnelAccepted');
    expect(part?.message).toMatch(/methods cannot be decided at layer 4.*denies more than it says/);
    expect(part?.observedGeneration).toBe(1);

    // Another controller's condition stays, and nothing is written that says what is there already.
    const path = pathOf('AuthorizationPolicy', 'shop', 'whole');
    const foreign = { type: 'WaypointAccepted', status: 'True', reason: 'Accepted', message: 'theirs' };
    await server.api.request('PATCH', `${path}/status`, { body: { status: { conditions: [foreign] } } });
    await waitFor(
      'our conditions to be back',
      async () => (await spoken('AuthorizationPolicy', 'whole')).length === 3,
      WAIT,
    );
    expect((await read('AuthorizationPolicy', 'whole')).conditions.map(({ message }) => message)).toContain('theirs');
    const { version } = await read('AuthorizationPolicy', 'whole');
    await putCustom(server, 'AuthorizationPolicy', 'shop', 'part', { action: 'DENY', rules: [{}] });
    await waitFor(
      'a mended policy to say so',
      async () =>
        (await spoken('AuthorizationPolicy', 'part')).join() ===
        'ZtunnelAccepted True Accepted,ebbtide.dev/Enforced True Enforced',
      WAIT,
    );
    expect((await read('AuthorizationPolicy', 'whole')).version).toBe(version);
    for (const [, name] of expected) await server.api.request('DELETE', pathOf('AuthorizationPolicy', 'shop', name));
  });
});

describe('replicas', () => {
  it('share one root, both serve, one writes, and another takes over', async () => {
    await server.api.request('DELETE', `/api/v1/namespaces/${SYSTEM}/secrets/istio-ca-secret`).catch(() => {});
    const [first, second] = await Promise.all([start(), start()]);
    expect(first.authority.bundle).toBe(second.authority.bundle);
    await waitFor('one to lead', () => first.leading !== second.leading, WAIT);
    const [leader, follower] = first.leading ? [first, second] : [second, first];
    const token = await proxyToken(proxies.n1);
    await makePod(server, 'shop', 'db-6', { node: 'n1', ip: '10.0.6.6', serviceAccount: 'db' });
    for (const controller of [leader, follower]) {
      const mirror = new Mirror(connect(controller), token);
      await waitFor('a replica to serve', () => mirror.workloads.has('Kubernetes//Pod/shop/db-6'), WAIT);
    }
    for (let look = 0; look < 20; look++) expect(first.leading && second.leading).toBe(false);
    controllers.splice(controllers.indexOf(leader), 1);
    const began = performance.now();
    await leader.close();
    await waitFor('the other to lead', () => follower.leading, WAIT);
    // Given back, not run out.
    expect(performance.now() - began).toBeLessThan(2500);
    await makeNamespace(server, 'after-failover');
    await waitFor(
      'the new leader to write',
      () =>
        server.api.request('GET', '/api/v1/namespaces/after-failover/configmaps/istio-ca-root-cert').then(
          () => true,
          () => false,
        ),
      WAIT,
    );
  });

  it('takes over from a leader that vanished without a word', async () => {
    const lease = `/apis/coordination.k8s.io/v1/namespaces/${SYSTEM}/leases`;
    const now = new Date().toISOString().replace('Z', '000Z');
    await server.api.request('POST', lease, {
      body: {
        metadata: { name: 'ebbtide-controller' },
        spec: { holderIdentity: 'vanished', leaseDurationSeconds: 2, acquireTime: now, renewTime: now },
      },
    });
    const began = performance.now();
    const controller = await start();
    expect(controller.leading).toBe(false);
    await waitFor('the lease to be taken', () => controller.leading, WAIT);
    expect(performance.now() - began).toBeGreaterThan(2000);
  });
});

describe('the root of trust', () => {
  const secret = `/api/v1/namespaces/${SYSTEM}/secrets`;
  const annotate = (annotations: Record<string, string>) =>
    server.api.request('PATCH', `${secret}/istio-ca-secret`, { body: { metadata: { annotations } } });

  it('is replaced with an overlap: announced, then signing, then alone', async () => {
    const controller = await start();
    await waitFor('it to lead', () => controller.leading, WAIT);
    const count = () => controller.authority.bundle.split('BEGIN CERTIFICATE').length - 1;
    const old = controller.authority;
    const {
      PHASE_ANNOTATION: phase,
      SINCE_ANNOTATION: since,
      ROTATE_ANNOTATION: rotate,
    } = await import('../../src/controller/cluster/rotation.js');
    await makePod(server, 'shop', 'db-4', { node: 'n1', ip: '10.0.4.4', serviceAccount: 'db' });
    const token = await proxyToken(proxies.n1);
    const sign = () =>
      createCertificate(connect(controller), bearer(token), makeRequest(), 'spiffe://cluster.local/ns/shop/sa/db');
    const issuer = (chain: readonly string[]) => {
      const leaf = new X509Certificate(chain[0] ?? '');
      const roots = (chain.at(-1) ?? '').match(/-----BEGIN[\s\S]+?END CERTIFICATE-----/g) ?? [];
      return roots.findIndex((root) => leaf.verify(new X509Certificate(root).publicKey));
    };
    expect(issuer(await waitFor('a certificate', sign, WAIT))).toBe(0);
    await annotate({ [rotate]: 'true' });
    await waitFor('the new root to be announced', () => count() === 2, WAIT);
    expect(issuer(await sign())).toBe(0);
    await waitFor(
      'both roots in a namespace',
      async () => {
        const path = '/api/v1/namespaces/shop/configmaps/istio-ca-root-cert';
        const map = await server.api.request<{ data: Record<string, string> }>('GET', path);
        return map.data['root-cert.pem'] === controller.authority.bundle;
      },
      WAIT,
    );
    // Nothing more before its time.
    expect(
      await server.api.request<{ metadata: { annotations: Record<string, string> } }>(
        'GET',
        `${secret}/istio-ca-secret`,
      ),
    ).toMatchObject({
      metadata: { annotations: { [phase]: 'announced' } },
    });
    const long = new Date(Date.now() - 86_400_000).toISOString();
    await annotate({ [since]: long });
    await waitFor('the new root to sign', async () => issuer(await sign()) === 1, WAIT);
    expect(count()).toBe(2);
    await annotate({ [since]: long });
    await waitFor('the old root to be dropped', () => count() === 1, WAIT);
    expect(issuer(await sign())).toBe(0);
    expect(controller.authority.bundle).not.toBe(old.bundle);
    await deletePod(server, 'shop', 'db-4');
  });

  it('stays what it was when its Secret is spoilt, and comes back when that is removed', async () => {
    const controller = await start();
    await waitFor('it to lead', () => controller.leading, WAIT);
    const { bundle } = controller.authority;
    const kept = await server.api.request<{ data: Record<string, string> }>('GET', `${secret}/istio-ca-secret`);
    const encode = (text: string) => Buffer.from(text).toString('base64');
    await server.api.request('PATCH', `${secret}/istio-ca-secret`, {
      body: { data: { 'ca-key.pem': encode('spoilt') } },
    });
    await waitFor('the spoilt Secret to be refused', () => lines.some(({ event }) => event === 'root_refused'), WAIT);
    expect(controller.authority.bundle).toBe(bundle);
    const other = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({
      type: 'pkcs8',
      format: 'pem',
    });
    await server.api.request('PATCH', `${secret}/istio-ca-secret`, {
      body: { data: { 'ca-key.pem': encode(String(other)) } },
    });
    await waitFor(
      'a key of something else to be refused',
      () => lines.some(({ event, msg }) => event === 'root_refused' && /is not the key of/.test(String(msg))),
      WAIT,
    );
    await server.api.request('DELETE', `${secret}/istio-ca-secret`);
    await waitFor(
      'the Secret to be back',
      async () => {
        const now = await server.api.request<{ data: Record<string, string> }>('GET', `${secret}/istio-ca-secret`);
        return JSON.stringify(now.data) === JSON.stringify(kept.data);
      },
      WAIT,
    );
  });

  for (const kind of ['rsa', 'ec'] as const) {
    it(`is an operator's intermediate (${kind}) where there is one, with its chain`, async () => {
      const { makePluggedAuthority, verifyChain } = await import('./lib/requests.js');
      const plugged = makePluggedAuthority(kind);
      const data = Object.fromEntries(
        Object.entries(plugged.files).map(([name, text]) => [name, Buffer.from(text).toString('base64')]),
      );
      await server.api.request('POST', secret, { body: { metadata: { name: 'cacerts' }, data } });
      try {
        const controller = await start();
        expect(controller.authority.bundle.trim()).toBe(plugged.files['root-cert.pem']?.trim());
        await makePod(server, 'shop', 'db-5', { node: 'n1', ip: '10.0.5.5', serviceAccount: 'db' });
        const token = await proxyToken(proxies.n1);
        // The connection itself is trusted by the root alone, over the intermediates that the server sends.
        const chain = await waitFor(
          'a certificate',
          () =>
            createCertificate(
              connect(controller),
              bearer(token),
              makeRequest(),
              'spiffe://cluster.local/ns/shop/sa/db',
            ),
          WAIT,
        );
        expect(chain).toHaveLength(4);
        expect(verifyChain(chain)).toMatch(/: OK$/);
        // Without what stands in between nobody can verify it.
        expect(() => verifyChain([chain[0] ?? '', chain.at(-1) ?? ''])).toThrow();
      } finally {
        await deletePod(server, 'shop', 'db-5');
        await server.api.request('DELETE', `${secret}/cacerts`);
        rmSync(plugged.directory, { recursive: true, force: true });
      }
    });
  }

  it('does not go over to a root that shares nothing with the one in use', async () => {
    const controller = await start();
    const { bundle } = controller.authority;
    const { makePluggedAuthority } = await import('./lib/requests.js');
    const plugged = makePluggedAuthority('ec');
    const data = Object.fromEntries(
      Object.entries(plugged.files).map(([name, text]) => [name, Buffer.from(text).toString('base64')]),
    );
    const before = lines.length;
    await server.api.request('POST', secret, { body: { metadata: { name: 'cacerts' }, data } });
    try {
      await waitFor(
        'the refusal',
        () =>
          lines.slice(before).some(({ event, msg }) => event === 'root_refused' && /shares no root/.test(String(msg))),
        WAIT,
      );
      expect(controller.authority.bundle).toBe(bundle);
    } finally {
      await server.api.request('DELETE', `${secret}/cacerts`);
      rmSync(plugged.directory, { recursive: true, force: true });
    }
  });
});
