/** What a byte stream is owed, through capture and tunnel: order, ends, resets, pressure, prompt failures. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Lab, must, placed, sleep, waitFor } from '../../src/lab/index.ts';
import { captured, labWith } from '../lib/mesh-lab.ts';
import { Background, client, events, PORT, startServer } from '../lib/peers.ts';

const GIBIBYTE = 2 ** 30;
const CLOSED_PORT = 9999;
/** The engine gives a TCP connect ten seconds; a second is added for its surroundings. */
const CONNECT_TIMEOUT_MS = 11_000;

async function streamsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const near = await lab.pod({ name: 'client', namespace: 'meshed', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  const neighbour = await lab.pod({ name: 'neighbour', namespace: 'meshed', node: 1 });
  const silent = await lab.pod({ name: 'silent', namespace: 'plain', node: 2 });
  const outside = await lab.pod({ name: 'outside', namespace: 'plain', node: 2 });
  await startServer(server);
  await startServer(neighbour);
  await must(placed(silent.place, ['nft', 'add table inet silent']));
  await must(
    placed(silent.place, ['nft', 'add chain inet silent input { type filter hook input priority 0; policy drop; }']),
  );
  await must(placed(silent.place, ['nft', 'add rule inet silent input icmpv6 type nd-neighbor-solicit accept']));
  await lab.startMesh();
  await captured(lab, near, server);
  await captured(lab, near, neighbour);
  return { near, server, neighbour, silent, outside };
}

describe('streams', () => {
  let made: Awaited<ReturnType<typeof streamsLab>> & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(streamsLab);
  });
  afterAll(() => made?.lab.close());

  for (const family of ['v4', 'v6'] as const) {
    for (const which of ['server', 'neighbour'] as const) {
      describe(`IP${family}, ${which === 'server' ? 'other node' : 'same node'}`, () => {
        const address = () => made[which].addresses[family];

        it('a server that speaks first is heard', async () => {
          const seen = await client(made.near, 'whoami', address(), PORT.whoami);
          expect(seen).toMatchObject({ peer: made.near.addresses[family], remote: address() });
        });

        it('half-close by the client: a long answer follows its end of file', async () => {
          expect(await client(made.near, 'after-eof', address(), PORT.afterEof)).toEqual({
            digest: true,
            bytes: 8 << 20,
          });
        });

        it('half-close by the server: the client still sends after it', async () => {
          const before = events(made[which]).length;
          const said = await client(made.near, 'finish-first', address(), PORT.finishFirst);
          expect(said).toEqual({ greeting: 'greeting', sent: 4 << 20 });
          const event = await waitFor('the server to read all', () => events(made[which])[before]);
          expect(event).toEqual({ port: PORT.finishFirst, received: 4 << 20 });
        });

        it('a reset by the server is a reset for the client', async () => {
          const said = await client(made.near, 'expect-reset', address(), PORT.reset);
          expect(said.outcome).toBe('reset');
          expect(said.ms).toBeLessThan(1000);
        });

        it('a reset by the client is a reset for the server', async () => {
          const before = events(made[which]).length;
          await client(made.near, 'send-reset', address(), PORT.watch);
          const event = await waitFor('the server to see the end', () => events(made[which])[before]);
          expect(event).toMatchObject({ ended: 'reset', peer: made.near.addresses[family] });
        });

        it('a closed port answers with a prompt reset', async () => {
          const said = await client(made.near, 'refused', address(), CLOSED_PORT, 10);
          expect(['ConnectionResetError', 'ConnectionRefusedError']).toContain(said.outcome);
          expect(said.ms).toBeLessThan(1000);
        });
      });
    }
  }

  it('clients that close first do not use up the ports of the pod', async () => {
    const range = 'net.ipv4.ip_local_port_range';
    const before = await must(placed(made.server.place, ['sysctl', '-n', range]));
    await must(placed(made.server.place, ['sysctl', '-qw', `${range}=40000 40599`]));
    try {
      // Twice as many as there are ports, within a tenth of the minute for which a closed connection keeps its own.
      expect(await client(made.near, 'close-first', made.server.addresses.v4, PORT.echo, 1200)).toEqual({
        failures: {},
      });
    } finally {
      await must(placed(made.server.place, ['sysctl', '-qw', `${range}=${before.trim()}`]));
    }
  });

  it('1 GiB to the server arrives whole', async () => {
    const said = await client(made.near, 'sink', made.server.addresses.v4, PORT.sink, GIBIBYTE, 120_000);
    expect(said).toEqual({ bytes: GIBIBYTE, same: true });
  }, 130_000);

  it('1 GiB from the server arrives whole', async () => {
    const said = await client(made.near, 'source', made.server.addresses.v4, PORT.source, GIBIBYTE, 120_000);
    expect(said).toEqual({ missing: 0, same: true });
  }, 130_000);

  it('1,000 connections at once each carry their byte', async () => {
    const said = await client(made.near, 'many', made.server.addresses.v4, PORT.echo, 1000);
    expect(said).toEqual({ opened: 1000, echoed: 1000, failures: {} });
  });

  it('a reader that stops for 10 s stops its writer, costs no memory, and holds up nobody else', async () => {
    const proxies = made.lab.nodes.map((node) => node.proxy?.pid ?? 0);
    const before = proxies.map(residentMb);
    const size = 256 << 20;
    const stalled = await Background.start(made.near, 'sink', made.server.addresses.v4, PORT.stall, size);
    const started = performance.now();
    await sleep(1000);
    let slowest = 0;
    while (performance.now() - started < 8000) {
      const asked = performance.now();
      const said = await client(made.near, 'echo', made.server.addresses.v4, PORT.echo);
      expect(said).toEqual({ ok: true });
      slowest = Math.max(slowest, performance.now() - asked);
    }
    expect(stalled.running).toBe(true);
    expect(slowest).toBeLessThan(2000);
    const grown = proxies.map((pid, i) => residentMb(pid) - (before[i] ?? 0));
    expect(Math.max(...grown)).toBeLessThan(48);
    expect(await stalled.result()).toEqual({ bytes: size, same: true });
  });

  it('a closed port outside the mesh answers with a prompt reset', async () => {
    const said = await client(made.near, 'refused', made.outside.addresses.v4, CLOSED_PORT, 10);
    expect(['ConnectionResetError', 'ConnectionRefusedError']).toContain(said.outcome);
    expect(said.ms).toBeLessThan(1000);
  });

  it('a destination that never answers: the client learns within the connect timeout', async () => {
    const said = await client(made.near, 'refused', made.silent.addresses.v4, PORT.echo, 30);
    expect(['ConnectionResetError', 'TimeoutError', 'eof']).toContain(said.outcome);
    expect(said.ms).toBeLessThan(CONNECT_TIMEOUT_MS);
  });
});

function residentMb(pid: number): number {
  const match = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
  return Number(match?.[1] ?? 0) / 1024;
}
