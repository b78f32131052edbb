/** Requests of a hand-made client with a good certificate: what it may reach, and whom it is taken for. */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadRoot } from '../../src/controller/root.ts';
import { type AccessLine, authorizationPolicy, type Lab, type Pod, sumMetrics, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { type Credentials, type HboneAnswer, type HboneRequest, hbone, makeCertificate } from '../lib/hbone.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { client, PORT, startServer } from '../lib/peers.ts';

async function connectLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const alice = await lab.pod({ name: 'alice', namespace: 'meshed', node: 1 });
  const bob = await lab.pod({ name: 'bob', namespace: 'meshed', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  const neighbour = await lab.pod({ name: 'neighbour', namespace: 'meshed', node: 2 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  for (const [name, pod] of [
    ['other', neighbour],
    ['own', server],
  ] as const) {
    const ports = [{ port: 80, targetPort: PORT.echo }];
    await lab.service({ name, namespace: 'meshed', pods: [pod], ports });
  }
  for (const pod of [server, neighbour]) await startServer(pod);
  await lab.startMesh();
  for (const pod of [server, neighbour]) await captured(lab, alice, pod);
  const root = await loadRoot(join(lab.ground.directory, 'data'));
  const asAlice = await makeCertificate({ identity: alice.identity, issuer: root });
  const asBob = await makeCertificate({ identity: bob.identity, issuer: root });
  return { alice, bob, server, neighbour, stranger, asAlice, asBob };
}

describe('CONNECT with a good certificate', () => {
  let made: Awaited<ReturnType<typeof connectLab>> & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(connectLab);
  });
  afterAll(() => made?.lab.close());

  const own = (port: number | string) => `${made.server.addresses.v4}:${port}`;
  const tunnel = (authority: string, more: Record<string, string> = {}): HboneRequest => ({
    headers: { ':method': 'CONNECT', ':authority': authority, ...more },
    payload: 'marker-of-a-stranger',
  });

  /** Sends requests to the server's HBONE port, on one connection. */
  async function ask(
    who: Credentials,
    requests: readonly HboneRequest[],
    family: 'v4' | 'v6' = 'v4',
  ): Promise<readonly HboneAnswer[]> {
    const { cert, key } = who;
    const host = made.server.addresses[family];
    const result = await hbone(made.stranger, { host, port: HBONE_PORT, alpn: ['h2'], cert, key, requests });
    expect(result.outcome, result.error).toBe('open');
    return result.answers;
  }
  const log = (): AccessLine[] => made.lab.node(2).accessLog();
  const counted = async (reason: string): Promise<number> =>
    sumMetrics(await made.lab.node(2).metrics(), 'ebbtide_connections_refused_total', { reason, direction: 'inbound' });
  /** Ports that the kernel chose for the listeners of the proxy in a pod. */
  async function listeners(pod: Pod): Promise<number[]> {
    const { stdout } = await pod.run(['ss', '-HltnpO']);
    const ports = stdout
      .split('\n')
      .filter((line) => !line.includes('python3') && line !== '')
      .map((line) => Number(/:(\d+)\s/.exec(line)?.[1]));
    return [...new Set(ports)];
  }

  interface Refusal {
    readonly name: string;
    readonly request: () => HboneRequest;
    readonly status: number;
    readonly reason: string;
    readonly family?: 'v6';
  }
  const refusals: readonly Refusal[] = [
    ...(['v4', 'v6'] as const).map((family) => ({
      name: `to another pod of the node, ${family}`,
      request: () =>
        tunnel(
          family === 'v4'
            ? `${made.neighbour.addresses.v4}:${PORT.echo}`
            : `[${made.neighbour.addresses.v6}]:${PORT.echo}`,
        ),
      status: 400,
      reason: 'authority-not-local',
    })),
    ...[
      ['a pod of the other node', () => `${made.alice.addresses.v4}:${PORT.echo}`],
      ["the pod's own address of the other family", () => `[${made.server.addresses.v6}]:${PORT.echo}`],
      ['a service of another pod, by address', () => '10.96.0.10:80'],
      ['the node', () => '172.30.0.2:15020'],
      ["the node's admin interface by loopback", () => '127.0.0.1:15000'],
      ['loopback', () => `127.0.0.1:${PORT.echo}`],
      ['loopback of IPv6', () => `[::1]:${PORT.echo}`],
      ['another loopback', () => `127.128.0.1:15001`],
      ['no address', () => `0.0.0.0:${PORT.echo}`],
    ].map(([name, authority]) => ({
      name: `to ${name as string}`,
      request: () => tunnel((authority as () => string)()),
      status: 400,
      reason: 'authority-not-local',
    })),
    ...[15001, 15006, 15008].map((port) => ({
      name: `to port ${port} of the mesh`,
      request: () => tunnel(own(port)),
      status: 503,
      reason: 'illegal-port',
    })),
    ...[15000, 15020, 15021, 9999].map((port) => ({
      name: `to port ${port}, where nobody listens in the pod`,
      request: () => tunnel(own(port)),
      status: 503,
      reason: 'connect-refused',
    })),
    ...[
      ['without a port', () => made.server.addresses.v4],
      ['with an empty port', () => own('')],
      ['with port 0', () => own(0)],
      ['with port 65536', () => own(65536)],
      ['with a port by name', () => own('http')],
      ['with a negative port', () => own('-1')],
      ['with a port in front of which stands a zero', () => own('09001')],
      ['without a host', () => `:${PORT.echo}`],
      ['with brackets that are not closed', () => `[${made.server.addresses.v6}:${PORT.echo}`],
    ].map(([name, authority]) => ({
      name: `${name as string}`,
      request: () => tunnel((authority as () => string)()),
      status: 400,
      reason: 'bad-request',
    })),
    ...['GET', 'POST', 'OPTIONS', 'connect'].map((method) => ({
      name: `by ${method}`,
      request: () => ({
        headers: { ':method': method, ':scheme': 'https', ':path': '/', ':authority': own(PORT.echo) },
      }),
      status: 400,
      reason: 'bad-request',
    })),
    ...['nobody.meshed.svc.cluster.local', 'other.meshed.svc.cluster.local', 'localhost'].map((host) => ({
      name: `to ${host}, which is no service of the pod`,
      request: () => tunnel(`${host}:80`),
      status: 503,
      reason: 'authority-not-local',
    })),
  ];

  it.each(refusals)('is refused $name', async ({ request, status, reason }) => {
    const { asAlice, alice, lab } = made;
    const [lines, before] = [log().length, await counted(reason)];
    // The tunnel itself is none the worse for it: the next request on it is served.
    const [refused, served] = await ask(asAlice, [request(), tunnel(own(PORT.echo))]);
    expect(refused).toEqual({ status, body: '' });
    expect(served).toEqual({ status: 200, body: 'marker-of-a-stranger' });
    const line = await waitFor(
      'its line in the log',
      () =>
        log()
          .slice(lines)
          .find((each) => each.reason === reason),
      { hint: () => processes(lab) },
    );
    expect(line).toMatchObject({ level: 'warn', direction: 'inbound', 'src.identity': alice.identity });
    expect(line.hint).toBeTruthy();
    expect(await counted(reason)).toBe(before + 1);
  });

  it('is refused to the listeners of the proxy, on whatever ports they are', async () => {
    const ports = await listeners(made.server);
    expect(ports.length).toBeGreaterThanOrEqual(3);
    const before = await counted('connect-refused');
    const answers = await ask(
      made.asAlice,
      ports.map((port) => tunnel(own(port))),
    );
    expect(answers).toEqual(ports.map(() => ({ status: 503, body: '' })));
    await waitFor('them to be counted', async () => (await counted('connect-refused')) === before + ports.length);
  });

  it.each([
    ['a user', () => `root@${own(PORT.echo)}`],
    ['a path', () => `${own(PORT.echo)}/x`],
  ])('is reset where the authority is none of HTTP, with %s in it', async (_, authority) => {
    const [lines, before] = [log().length, await counted('bad-request')];
    const [reset, served] = await ask(made.asAlice, [tunnel(authority()), tunnel(own(PORT.echo))]);
    expect(reset).toMatchObject({ status: 0, body: '', error: 'ERR_HTTP2_STREAM_ERROR' });
    expect(served).toEqual({ status: 200, body: 'marker-of-a-stranger' });
    await waitFor('it to be counted', async () => (await counted('bad-request')) === before + 1);
    expect(log().slice(lines)).toContainEqual(expect.objectContaining({ reason: 'bad-request' }));
  });

  it('is let in by the name of a service of the pod, at the port that the service has there', async () => {
    const before = log().length;
    const [answer] = await ask(made.asAlice, [tunnel('own.meshed.svc.cluster.local:80')]);
    expect(answer).toEqual({ status: 200, body: 'marker-of-a-stranger' });
    const line = await waitFor('its line', () =>
      log()
        .slice(before)
        .find((each) => each.direction === 'inbound'),
    );
    expect(line).toMatchObject({ 'dst.addr': own(PORT.echo), 'dst.service': 'own.meshed.svc.cluster.local' });
  });

  /** Everything that other proxies have ever taken a client's identity from, in the name of another. */
  const claims = (of: Pod): Record<string, string> => ({
    forwarded: `for="${of.addresses.v4}:1234";by="${of.identity}";host=other.meshed.svc.cluster.local`,
    baggage: `k8s.cluster.name=Kubernetes,k8s.namespace.name=${of.namespace},k8s.deployment.name=${of.name},service.name=${of.name}`,
    'x-forwarded-client-cert': `By=spiffe://x;URI=${of.identity}`,
    'x-forwarded-for': of.addresses.v4,
    'x-envoy-external-address': of.addresses.v4,
    'x-istio-source': 'waypoint',
    'x-spiffe-id': of.identity,
    'x-real-ip': of.addresses.v4,
  });

  it('is logged and counted as who its certificate says, whatever its headers claim', async () => {
    const { asAlice, alice, bob, stranger, lab } = made;
    const before = log().length;
    const [answer] = await ask(asAlice, [{ headers: tunnel(own(PORT.whoami), claims(bob)).headers }]);
    expect(answer?.status).toBe(200);
    // The application sees where the connection came from, not what was claimed.
    expect(JSON.parse(answer?.body ?? '')).toMatchObject({ peer: stranger.addresses.v4 });
    const line = await waitFor('its line', () =>
      log()
        .slice(before)
        .find((each) => each.direction === 'inbound'),
    );
    expect(line).toMatchObject({ 'src.identity': alice.identity });
    expect(String(line['src.addr'])).toContain(stranger.addresses.v4);
    expect(JSON.stringify(line)).not.toContain(bob.identity);
    const metrics = await lab.node(2).metrics();
    const principals = metrics
      .filter(({ name, value }) => name === 'istio_tcp_connections_opened_total' && value > 0)
      .map(({ labels }) => labels.source_principal);
    expect(principals).toContain(alice.identity);
    expect(principals).not.toContain(bob.identity);
  });

  it('is allowed or denied as who its certificate says', async () => {
    const { lab, alice, bob, asAlice, asBob, server } = made;
    const policy = authorizationPolicy('only-bob', 'meshed', {
      selector: { matchLabels: { app: 'server' } },
      action: 'ALLOW',
      rules: [{ from: [{ source: { principals: [bob.identity.slice('spiffe://'.length)] } }] }],
    });
    lab.manifests.write(policy);
    try {
      await waitFor('alice to be refused', async () => {
        const [answer] = await ask(asAlice, [tunnel(own(PORT.echo))]);
        return answer?.status === 401;
      });
      const [lines, before] = [log().length, await counted('policy-no-allow')];
      expect(await ask(asAlice, [tunnel(own(PORT.echo), claims(bob))])).toEqual([{ status: 401, body: '' }]);
      const line = await waitFor('its line', () => log().slice(lines)[0], { hint: () => processes(lab) });
      expect(line).toMatchObject({ reason: 'policy-no-allow', response_flags: 'DENY', 'src.identity': alice.identity });
      expect(await counted('policy-no-allow')).toBe(before + 1);
      expect(await ask(asBob, [tunnel(own(PORT.echo), claims(alice))])).toEqual([
        { status: 200, body: 'marker-of-a-stranger' },
      ]);
      // Policy is no way around the check of the authority.
      expect(await ask(asBob, [tunnel(`${made.neighbour.addresses.v4}:${PORT.echo}`)])).toMatchObject([
        { status: 400 },
      ]);
      expect(await client(bob, 'echo', server.addresses.v4, PORT.echo)).toEqual({ ok: true });
      await expect(client(alice, 'echo', server.addresses.v4, PORT.echo)).rejects.toThrow();
    } finally {
      lab.manifests.remove(policy);
    }
  });
});
