/** Who talks how: every kind of client to every kind of server, near and far, both families, by every kind of address. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { analyseCapture, type Lab, type Pod, sleep, type WireRecording, waitFor } from '../../src/lab/index.ts';
import { captured, labWith, metricsOf, opened, processes, type Reporter } from '../lib/mesh-lab.ts';
import { client, PORT, startServer } from '../lib/peers.ts';

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
            });
          }
        }
      }
    }
  }

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
          expect(new Set(protocols), `${clientKind} to ${serverKind}`).toEqual(
            new Set([hbone ? '15008 tls' : `${PORT.whoami} not`]),
          );
        }
      }
    }
  });
});

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
