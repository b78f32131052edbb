/** What the demo shows, on two nodes that are two machines; the wire is recorded outside of both, from boot to power-off. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  analyseCapture,
  authorizationPolicy,
  namespaceManifest,
  peerAuthentication,
  sumMetrics,
  waitFor,
} from '../../src/lab/index.ts';
import { serviceManifest } from '../../src/lab/manifests.ts';
import { CONTROLLER_PORT, HBONE_PORT } from '../../src/mesh/ports.ts';
import { PORT } from '../lib/peers.ts';
import { isOf, Pair, type VmNode, type VmPod } from './lib/index.ts';

const OPENED = 'istio_tcp_connections_opened_total';
/** What test clients and servers say (test/lib/programs). */
const MARKERS = ['payload-in-clear', 'greeting'];
const SERVICE = '10.96.0.20';
const ENROLMENT_MS = 60_000;

async function cluster(pair: Pair) {
  const { first, second } = pair;
  await pair.namespace('meshed', true);
  await pair.namespace('plain', false);
  const client = await pair.pod(first, 'client', 'meshed');
  const other = await pair.pod(first, 'other', 'meshed');
  const stranger = await pair.pod(first, 'stranger', 'plain');
  const server = await pair.pod(second, 'server', 'meshed');
  const ports = [{ port: 80, targetPort: PORT.whoami }];
  await pair.write(
    serviceManifest({ name: 'server', namespace: 'meshed', addresses: [SERVICE], selector: { app: 'server' }, ports }),
  );
  await second.startServer(server);
  await pair.startMesh();
  await isCaptured(first, client, second, server);
  return { client, other, stranger, server };
}

/** Connects until the server's node counts it as mutual TLS. */
async function isCaptured(from: VmNode, client: VmPod, to: VmNode, server: VmPod): Promise<void> {
  const count = async () =>
    sumMetrics(await to.metrics(), OPENED, {
      reporter: 'destination',
      connection_security_policy: 'mutual_tls',
      source_principal: client.identity,
      destination_principal: server.identity,
    });
  const before = await count();
  await waitFor(
    `a connection of ${client.name} to ${server.name} to be carried with mutual TLS`,
    async () => {
      await from.client(client, 'refused', server.addresses.v6, PORT.whoami, 5);
      return (await count()) > before;
    },
    { timeoutMs: ENROLMENT_MS, intervalMs: 200 },
  );
}

describe('two guests', () => {
  let pair: Pair;
  let made: Awaited<ReturnType<typeof cluster>>;
  beforeAll(async () => {
    pair = await Pair.boot();
    try {
      made = await cluster(pair);
    } catch (error) {
      throw new Error(`${(error as Error).message}\n${await pair.logs()}`);
    }
  });
  afterAll(() => pair?.close());

  it('traffic flows by pod address and by Service address; the server sees the client', async () => {
    const { client, server } = made;
    for (const family of ['v4', 'v6'] as const) {
      const seen = await pair.first.client(client, 'whoami', server.addresses[family], PORT.whoami);
      expect(seen).toMatchObject({ peer: client.addresses[family], remote: server.addresses[family] });
    }
    const seen = await pair.first.client(client, 'whoami', SERVICE, 80);
    expect(seen).toMatchObject({ peer: client.addresses.v4, local: server.addresses.v4 });
    const load = await pair.first.client(client, 'load', server.addresses.v4, PORT.echo, 3);
    expect(load).toMatchObject({ failures: {}, long_lived: true });
  });

  it('an AuthorizationPolicy refuses a client and cuts what it had open; others go on', async () => {
    const { client, other, server } = made;
    const open = pair.first.background(client, 'hold', server.addresses.v4, PORT.watch, 60);
    await waitFor('the connection to be open', () => open.process.stderr.includes('open'));
    const principals = [client.identity.replace('spiffe://', '')];
    const policy = authorizationPolicy('no-client', 'meshed', {
      action: 'DENY',
      rules: [{ from: [{ source: { principals } }] }],
    });
    await pair.write(policy);
    expect(await open.report).toMatchObject({ outcome: expect.stringMatching(/eof|reset/) });
    expect(await pair.first.client(client, 'refused', server.addresses.v4, PORT.whoami, 10)).not.toMatchObject({
      outcome: 'data',
    });
    const seen = await pair.first.client(other, 'whoami', server.addresses.v4, PORT.whoami);
    expect(seen).toMatchObject({ peer: other.addresses.v4 });
    await pair.remove(policy);
    await waitFor('the client to be let in again', async () => {
      const now = await pair.first.client(client, 'refused', server.addresses.v4, PORT.whoami, 10);
      return now.outcome === 'data';
    });
  });

  it('STRICT refuses a client in clear', async () => {
    const { client, stranger, server } = made;
    const ask = async () =>
      (await pair.first.client(stranger, 'refused', server.addresses.v4, PORT.whoami, 10)).outcome;
    expect(await ask()).toBe('data');
    await pair.write(peerAuthentication('strict', 'meshed', 'STRICT'));
    await waitFor('a client in clear to be refused', async () => (await ask()) !== 'data');
    expect((await pair.first.client(client, 'refused', server.addresses.v4, PORT.whoami, 10)).outcome).toBe('data');
  });

  it('a namespace that is labelled joins as it runs, and leaves when the label goes', async () => {
    const { stranger, server } = made;
    await pair.write(namespaceManifest('plain', true));
    await isCaptured(pair.first, stranger, pair.second, server);
    await pair.write(namespaceManifest('plain', false));
    await waitFor('the pod to be let go, and refused in clear', async () => {
      const now = await pair.first.client(stranger, 'refused', server.addresses.v4, PORT.whoami, 10);
      return now.outcome !== 'data';
    });
  });

  it('a proxy that is killed refuses until it is back, and nothing leaves in clear', async () => {
    const { client, server } = made;
    const old = pair.second.proxy;
    old?.kill(9);
    await old?.ended;
    const refused = await pair.first.client(client, 'refused', server.addresses.v4, PORT.whoami, 5);
    expect(refused.outcome).not.toBe('data');
    pair.second.startProxy();
    await pair.second.ready();
    await isCaptured(pair.first, client, pair.second, server);
  });

  it('from the first boot to the power-off no payload is on the wire, and between captured pods only TLS 1.3', async () => {
    await pair.powerOff();
    const report = analyseCapture(pair.recording, MARKERS);
    expect(report.markersFound).toEqual([]);
    const between = report.connections.filter(
      ({ client, server }) => isOf([made.server], client, server) && !isOf([made.stranger], client, server),
    );
    const tls = between.filter(({ protocol }) => protocol === 'tls1.3');
    expect(tls.length).toBeGreaterThan(0);
    expect(between.filter(({ protocol, serverPort }) => protocol !== 'empty' && serverPort !== HBONE_PORT)).toEqual([]);
    expect(between.filter(({ protocol }) => !['tls1.3', 'empty'].includes(protocol))).toEqual([]);
    const control = report.connections.filter(({ serverPort }) => serverPort === CONTROLLER_PORT);
    expect(new Set(control.map(({ protocol }) => protocol))).toEqual(new Set(['tls1.3']));
  });
});
