/** Who talks how: every kind of client to every kind of server, near and far, both families, by every kind of address. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  analyseCapture,
  type Lab,
  type Metric,
  type Pod,
  sleep,
  sumMetrics,
  type WireRecording,
  waitFor,
} from '../../src/lab/index.ts';
import { captured, labWith, metricsOf, opened, processes, type Reporter } from '../lib/mesh-lab.ts';
import { Background, client, PORT, startServer } from '../lib/peers.ts';

type Kind = 'captured' | 'uncaptured';
type Via = 'pod' | 'service' | 'headless';
const KINDS: readonly Kind[] = ['captured', 'uncaptured'];
const NODES = [1, 2] as const;
const FAMILIES = ['v4', 'v6'] as const;
const VIAS: readonly Via[] = ['pod', 'service', 'headless'];

const namespaceOf = (kind: Kind) => (kind === 'captured' ? 'meshed' : 'plain');

async function matrixLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const clients = {} as Record<Kind, Pod>;
  const servers = new Map<string, { pod: Pod; service: { v4: string; v6: string } }>();
  for (const kind of KINDS) {
    const namespace = namespaceOf(kind);
    clients[kind] = await lab.pod({ name: 'client', namespace, node: 1 });
    for (const node of NODES) {
      for (const headless of [false, true]) {
        const name = `server${node}${headless ? '-headless' : ''}`;
        const pod = await lab.pod({ name, namespace, node });
        await startServer(pod);
        const ports = [{ port: 80, targetPort: PORT.whoami }];
        const service = await lab.service({ name, namespace, pods: [pod], ports, headless });
        servers.set(`${kind} ${node} ${headless}`, { pod, service });
      }
    }
  }
  await lab.startMesh();
  const server = (kind: Kind, node: number, headless: boolean) => {
    const found = servers.get(`${kind} ${node} ${headless}`);
    if (found === undefined) throw new Error(`no such server: ${kind} ${node}`);
    return found;
  };
  for (const node of NODES) {
    for (const headless of [false, true]) await captured(lab, clients.captured, server('captured', node, headless).pod);
  }
  return { clients, server };
}

describe('matrix', () => {
  let made: Awaited<ReturnType<typeof matrixLab>> & { lab: Lab };
  let recording: WireRecording;

  beforeAll(async () => {
    made = await labWith(matrixLab);
    recording = await made.lab.recordWire('matrix');
  });
  afterAll(() => made?.lab.close());

  for (const clientKind of KINDS) {
    for (const serverKind of KINDS) {
      for (const node of NODES) {
        for (const family of FAMILIES) {
          for (const via of VIAS) {
            const where = node === 1 ? 'same node' : 'other node';
            it(`${clientKind} client, ${serverKind} server, ${where}, IP${family}, by ${via} address`, async () => {
              const { lab, clients, server } = made;
              const from = clients[clientKind];
              const { pod, service } = server(serverKind, node, via === 'headless');
              const address = via === 'service' ? service[family] : pod.addresses[family];
              const before = await metricsOf(lab);
              const seen = await client(from, 'whoami', address, via === 'service' ? 80 : PORT.whoami);
              expect(seen).toEqual({
                peer: from.addresses[family],
                peername: from.addresses[family],
                local: pod.addresses[family],
                remote: address,
                own: from.addresses[family],
              });
              // Who counted the connection, and as what: this tells HBONE from plain.
              const expected = expectedCounts(clientKind, serverKind);
              const counts = async () => {
                const after = await metricsOf(lab);
                return Object.fromEntries(
                  Object.keys(expected).map((key) => {
                    const [reporter, policy] = key.split(' ') as [Reporter, 'mutual_tls' | 'unknown'];
                    return [key, opened(after, reporter, policy) - opened(before, reporter, policy)];
                  }),
                );
              };
              await waitFor('the counters', async () => sum(await counts()) >= sum(expected), {
                timeoutMs: 3000,
                hint: () => processes(lab),
              });
              expect(await counts()).toEqual(expected);
              // ... and in whose name: the one series that grew bears both identities, or none of a plain connection.
              const after = await metricsOf(lab);
              for (const key of Object.keys(expected).filter((each) => expected[each] === 1)) {
                const [reporter = '', policy = ''] = key.split(' ');
                const tunnel = policy === 'mutual_tls';
                const labels = {
                  reporter,
                  connection_security_policy: policy,
                  source_principal: tunnel ? from.identity : 'unknown',
                  destination_principal: tunnel ? pod.identity : 'unknown',
                  source_workload: from.name,
                  source_workload_namespace: from.namespace,
                  destination_workload: pod.name,
                  destination_workload_namespace: pod.namespace,
                  ...(via === 'service' && reporter === 'source' ? { destination_service_name: pod.name } : {}),
                };
                const grown = (of: readonly Metric[]) => sumMetrics(of, 'istio_tcp_connections_opened_total', labels);
                expect(grown(after) - grown(before), JSON.stringify(labels)).toBe(1);
              }
            });
          }
        }
      }
    }
  }

  for (const serverKind of KINDS) {
    for (const node of NODES) {
      for (const family of FAMILIES) {
        const where = `${serverKind} server, ${node === 1 ? 'same node' : 'other node'}, IP${family}`;

        it(`a socket bound before it connects keeps its address and port: ${where}`, async () => {
          const { lab, clients, server } = made;
          const from = clients.captured;
          const { pod } = server(serverKind, node, false);
          const own = from.addresses[family];
          const before = await metricsOf(lab);
          const seen = await client(from, 'bind-first', pod.addresses[family], PORT.whoami, own);
          expect(seen).toMatchObject({ kept: true, own, peer: own, local: pod.addresses[family] });
          await carried(lab, before, serverKind);
        });

        for (const how of ['message', 'option']) {
          it(`TCP Fast Open by ${how} brings its first bytes: ${where}`, async () => {
            const { lab, clients, server } = made;
            const { pod } = server(serverKind, node, false);
            const address = pod.addresses[family];
            const before = await metricsOf(lab);
            const seen = await client(clients.captured, 'fast-open', address, PORT.echo, how);
            expect(seen).toEqual({ ok: true, remote: address });
            await carried(lab, before, serverKind);
          });
        }
      }
    }
  }

  it('the gauge of open connections counts what is open, on both sides', async () => {
    const { lab, clients, server } = made;
    const { pod } = server('captured', 2, false);
    const open = async (node: 1 | 2, reporter: Reporter) =>
      sumMetrics(await lab.node(node).metrics(), 'istio_tcp_sockets_open', { reporter });
    const both = async () => [await open(1, 'source'), await open(2, 'destination')];
    await waitFor('nothing to be open', async () => (await both()).every((count) => count === 0));
    const held = await Promise.all(
      [1, 2, 3].map(() => Background.start(clients.captured, 'hold', pod.addresses.v4, PORT.watch, 8)),
    );
    for (const each of held) await each.said('open');
    expect(await both()).toEqual([3, 3]);
    await Promise.all(held.map((each) => each.result()));
    await waitFor('the connections to be closed', async () => (await both()).every((count) => count === 0));
  });

  it('the wire holds TLS 1.3 between captured pods and plain connections for all others', async () => {
    const { clients, server } = made;
    await sleep(200);
    const { connections } = analyseCapture(await recording.stop(), []);
    const between = (from: Pod, to: Pod) =>
      connections.filter(
        (connection) =>
          Object.values(from.addresses).some((address) => textOf(address) === hostOf(connection.client)) &&
          Object.values(to.addresses).some((address) => textOf(address) === hostOf(connection.server)) &&
          connection.payloadBytes > 0,
      );
    for (const clientKind of KINDS) {
      for (const serverKind of KINDS) {
        for (const headless of [false, true]) {
          const seen = between(clients[clientKind], server(serverKind, 2, headless).pod);
          const hbone = clientKind === 'captured' && serverKind === 'captured';
          // A tunnel that was open before the recording is seen from its middle: TLS records without a ServerHello.
          const protocols = seen.map(
            ({ serverPort, protocol }) => `${serverPort} ${protocol.slice(0, 3).toLowerCase()}`,
          );
          const plain = headless || clientKind !== 'captured' ? [PORT.whoami] : [PORT.whoami, PORT.echo];
          expect(new Set(protocols), `${clientKind} to ${serverKind}`).toEqual(
            new Set(hbone ? ['15008 tls'] : plain.map((port) => `${port} not`)),
          );
        }
      }
    }
  });
});

/** Resolves when a connection of a captured client was counted as what it has to be, and nothing else was. */
async function carried(lab: Lab, before: readonly Metric[], serverKind: Kind): Promise<void> {
  const policy = serverKind === 'captured' ? 'mutual_tls' : 'unknown';
  const other = serverKind === 'captured' ? 'unknown' : 'mutual_tls';
  const grown = async (of: 'mutual_tls' | 'unknown') =>
    opened(await metricsOf(lab), 'source', of) - opened(before, 'source', of);
  await waitFor('the counter', async () => (await grown(policy)) === 1, {
    timeoutMs: 3000,
    hint: () => processes(lab),
  });
  expect(await grown(other)).toBe(0);
}

function expectedCounts(clientKind: Kind, serverKind: Kind): Record<string, number> {
  const tunnel = clientKind === 'captured' && serverKind === 'captured';
  return {
    'source mutual_tls': tunnel ? 1 : 0,
    'destination mutual_tls': tunnel ? 1 : 0,
    'source unknown': clientKind === 'captured' && !tunnel ? 1 : 0,
    'destination unknown': serverKind === 'captured' && !tunnel ? 1 : 0,
  };
}

function sum(counts: Record<string, number>): number {
  return Object.values(counts).reduce((total, count) => total + count, 0);
}

function hostOf(endpoint: string): string {
  return endpoint.slice(0, endpoint.lastIndexOf(':'));
}

/** An address as the capture writes it: IPv6 in brackets with all its digits. */
function textOf(address: string): string {
  if (!address.includes(':')) return address;
  const [head = '', tail = ''] = address.split('::');
  const left = head.split(':').filter((group) => group !== '');
  const right = tail.split(':').filter((group) => group !== '');
  const middle = new Array<string>(8 - left.length - right.length).fill('0');
  return `[${[...left, ...middle, ...right].map((group) => group.padStart(4, '0')).join(':')}]`;
}
