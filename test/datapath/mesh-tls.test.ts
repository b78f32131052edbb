/** The HBONE port of a real proxy before a hand-made client: whom it refuses, with which reason, counted and logged. */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadRoot } from '../../src/controller/root.ts';
import { type AccessLine, type Lab, type Pod, sumMetrics, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { type Credentials, type HboneSpec, hbone, makeCertificate, SERVER_AUTH } from '../lib/hbone.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { PORT, startServer } from '../lib/peers.ts';

async function tlsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const alice = await lab.pod({ name: 'alice', namespace: 'meshed', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  await startServer(server);
  await lab.startMesh();
  await captured(lab, alice, server);
  const root = await loadRoot(join(lab.ground.directory, 'data'));
  const other = await loadRoot(join(lab.ground.directory, 'other-ca'));
  const valid = await makeCertificate({ identity: alice.identity, issuer: root });
  return { alice, server, stranger, root, other, valid };
}

interface Case {
  readonly name: string;
  readonly reason: string;
  /** What the line says beside the reason. */
  readonly detail: RegExp;
  spec(made: Made): Promise<Partial<HboneSpec>> | Partial<HboneSpec>;
}
type Made = Awaited<ReturnType<typeof tlsLab>>;

const h2 = ['h2'];
const show = ({ cert, key }: Credentials): Partial<HboneSpec> => ({ cert, key, alpn: h2 });
const identity = (made: Made) => made.alice.identity;
const soon = (ms: number) => new Date(Date.now() + ms);

const CASES: readonly Case[] = [
  {
    name: 'no client certificate',
    reason: 'peer-untrusted',
    detail: /did not return a certificate/,
    spec: () => ({ alpn: h2 }),
  },
  {
    name: 'a certificate of another trust domain, signed by our root',
    reason: 'peer-untrusted',
    detail: /of trust domain evil\.example, not cluster\.local/,
    spec: async ({ root }) =>
      show(await makeCertificate({ identity: 'spiffe://evil.example/ns/meshed/sa/alice', issuer: root })),
  },
  {
    name: 'a certificate without an identity',
    reason: 'peer-untrusted',
    detail: /no SPIFFE identity/,
    spec: async ({ root }) => show(await makeCertificate({ issuer: root })),
  },
  {
    name: 'a certificate with a URI that is no SPIFFE identity',
    reason: 'peer-untrusted',
    detail: /no SPIFFE identity/,
    spec: async ({ root }) =>
      show(await makeCertificate({ identity: 'https://cluster.local/ns/meshed/sa/alice', issuer: root })),
  },
  {
    name: 'a certificate that expired a minute ago',
    reason: 'peer-untrusted',
    detail: /certificate has expired/,
    spec: async (made) =>
      show(await makeCertificate({ identity: identity(made), issuer: made.root, notAfter: soon(-60_000) })),
  },
  {
    name: 'a certificate that is valid in an hour',
    reason: 'peer-untrusted',
    detail: /not yet valid/,
    spec: async (made) =>
      show(
        await makeCertificate({
          identity: identity(made),
          issuer: made.root,
          notBefore: soon(3_600_000),
          notAfter: soon(7_200_000),
        }),
      ),
  },
  {
    name: 'a self-signed certificate',
    reason: 'peer-untrusted',
    detail: /self.signed certificate/,
    spec: async (made) => show(await makeCertificate({ identity: identity(made) })),
  },
  {
    name: 'a certificate of another authority with the same names',
    reason: 'peer-untrusted',
    detail: /unable to get local issuer|signature failure|self.signed certificate in/,
    spec: async (made) => show(await makeCertificate({ identity: identity(made), issuer: made.other })),
  },
  {
    name: 'a certificate signed by a workload',
    reason: 'peer-untrusted',
    detail: /invalid CA certificate/,
    spec: async (made) => {
      const workload = await makeCertificate({ subject: 'CN=eve', identity: identity(made), issuer: made.root });
      return show(await makeCertificate({ identity: identity(made), issuer: workload }));
    },
  },
  {
    name: 'a certificate that is for servers only',
    reason: 'peer-untrusted',
    detail: /purpose/,
    spec: async (made) =>
      show(await makeCertificate({ identity: identity(made), issuer: made.root, usages: [SERVER_AUTH] })),
  },
  {
    name: 'TLS 1.2',
    reason: 'tls-handshake-failed',
    detail: /unsupported protocol/,
    spec: ({ valid }) => ({ ...show(valid), minVersion: 'TLSv1.2', maxVersion: 'TLSv1.2' }),
  },
  {
    name: 'no ALPN',
    reason: 'h2-handshake-failed',
    detail: /ALPN/,
    spec: ({ valid: { cert, key } }) => ({ cert, key }),
  },
  {
    name: 'another ALPN',
    reason: 'h2-handshake-failed',
    detail: /ALPN/,
    spec: ({ valid }) => ({ ...show(valid), alpn: ['http/1.1', 'h2c'] }),
  },
  {
    name: 'no TLS at all',
    reason: 'tls-handshake-failed',
    detail: /./,
    spec: () => ({ plain: 'GET / HTTP/1.1\r\nhost: server\r\n\r\n' }),
  },
];

describe('the HBONE port of a pod', () => {
  let made: Made & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(tlsLab);
  });
  afterAll(() => made?.lab.close());

  const request = { headers: {}, payload: 'marker' };
  const to = (pod: Pod, family: 'v4' | 'v6' = 'v4') => ({ host: pod.addresses[family], port: HBONE_PORT });
  /** CONNECT to the echo port, which shows whether bytes come through. */
  const connect = () => ({
    ...request,
    headers: { ':method': 'CONNECT', ':authority': `${made.server.addresses.v4}:${PORT.echo}` },
  });
  const linesOf = (pod: Pod): AccessLine[] =>
    made.lab
      .node(2)
      .accessLog()
      .filter((line) => String(line['src.addr']).startsWith(`${pod.addresses.v4}:`));
  async function counted(reason: string) {
    const metrics = await made.lab.node(2).metrics();
    return {
      refused: sumMetrics(metrics, 'ebbtide_connections_refused_total', { reason, direction: 'inbound' }),
      allRefused: sumMetrics(metrics, 'ebbtide_connections_refused_total', {}),
      handshakes: sumMetrics(metrics, 'ebbtide_tls_handshake_failures_total', {}),
      opened: sumMetrics(metrics, 'istio_tcp_connections_opened_total', { reporter: 'destination' }),
    };
  }

  it('takes a certificate of the mesh: what is refused below is refused for its own fault', async () => {
    const { stranger, server, valid } = made;
    for (const family of ['v4', 'v6'] as const) {
      const result = await hbone(stranger, { ...to(server, family), ...show(valid), requests: [] });
      expect(result).toMatchObject({ outcome: 'open' });
    }
    const result = await hbone(stranger, { ...to(server), ...show(valid), requests: [connect()] });
    expect(result.answers).toEqual([{ status: 200, body: 'marker' }]);
  });

  it.each(CASES)('refuses $name', async ({ reason, detail, spec }) => {
    const { stranger, server, lab } = made;
    const before = await counted(reason);
    const lines = linesOf(stranger).length;
    const result = await hbone(stranger, { ...to(server), ...(await spec(made)), requests: [connect()] });
    expect(result).toMatchObject({ outcome: 'refused', answers: [] });
    const line = await waitFor('its line in the log', () => linesOf(stranger)[lines], { hint: () => processes(lab) });
    expect(line).toMatchObject({
      level: 'warn',
      direction: 'inbound',
      reason,
      'dst.addr': `${server.addresses.v4}:${HBONE_PORT}`,
      'dst.workload': server.name,
      msg: 'connection failed',
    });
    expect(line?.error).toMatch(detail);
    expect(line?.hint).toBeTruthy();
    expect(line?.['src.identity']).toBeUndefined();
    const after = await counted(reason);
    expect(after).toEqual({
      refused: before.refused + 1,
      allRefused: before.allRefused + 1,
      handshakes: before.handshakes + 1,
      opened: before.opened,
    });
    expect(linesOf(stranger)).toHaveLength(lines + 1);
  });

  it('serves its own pods as before', () => captured(made.lab, made.alice, made.server));
});
