/** What root in a captured pod can take or reach of the proxy's listeners, its own pod's and those of others. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type AccessLine, type Lab, type Pod, sleep, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { buildPeer, connectFrom, proxyListeners, serveIn } from '../lib/hostile.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { Background, client, PORT, startServer } from '../lib/peers.ts';
import type { Peer } from './capture/lab.ts';

const MESH_PORTS = [15001, 15006, 15008] as const;

async function portsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const root = await lab.pod({ name: 'root', namespace: 'meshed', node: 2 });
  const neighbour = await lab.pod({ name: 'neighbour', namespace: 'meshed', node: 2 });
  const far = await lab.pod({ name: 'far', namespace: 'meshed', node: 1 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  const plain = await lab.pod({ name: 'plain', namespace: 'plain', node: 2 });
  for (const pod of [root, neighbour]) await startServer(pod);
  await lab.startMesh();
  for (const pod of [root, neighbour]) await captured(lab, far, pod);
  const peer = await buildPeer(lab);
  return { root, neighbour, far, stranger, plain, peer };
}

let made: Awaited<ReturnType<typeof portsLab>> & { lab: Lab };
beforeAll(async () => {
  made = await labWith(portsLab);
});
afterAll(() => made?.lab.close());

const inbound = (): AccessLine[] =>
  made.lab
    .node(2)
    .accessLog()
    .filter((line) => line.direction === 'inbound');
/** Number of lines once those of earlier connections are there: the engine gives records to the log in batches. */
async function inboundSettled(): Promise<number> {
  for (let before = -1; ; ) {
    const now = inbound().length;
    if (now === before) return now;
    before = now;
    await sleep(700);
  }
}
const listenersOf = (pod: Pod) => proxyListeners(pod, made.lab.node(pod.node).proxy?.pid ?? 0);
const accepted = (server: Peer): number => server.lines.filter((line) => 'accepted' in line).length;

/** Listeners of root's own on every port of the mesh, in both families. */
async function occupy(ports: readonly number[], reusePort: boolean): Promise<Peer[]> {
  const servers: Peer[] = [];
  for (const port of ports) servers.push(await serveIn(made.peer, made.root, '::', port, reusePort));
  return servers;
}

describe('listeners of root in a captured pod', () => {
  it('are opened without SO_REUSEADDR too, while connections of the pod are captured', async () => {
    // The first of all, since what a server of the pod has closed keeps its port busy for a while, meshed or not.
    const { root, neighbour } = made;
    const open = [
      await Background.start(root, 'hold', neighbour.addresses.v4, PORT.watch, 30),
      await Background.start(root, 'hold', neighbour.addresses.v6, PORT.watch, 30),
    ];
    for (const connection of open) await connection.said('open');
    // Where the kernel has the proxy's ends of them, which an application's listener must not collide with.
    const { stdout } = await root.run(['ss', '-Htn', 'state', 'established', '( src 127.128.0.0/10 or src [::1] )']);
    const ports = [...stdout.matchAll(/(?:127\.1[2-9]\d\.[\d.]+|\[::1\]):(\d+)\s/g)].map(([, port]) => Number(port));
    expect(ports.length, stdout).toBeGreaterThanOrEqual(2);
    const bind = `
import socket, sys
for port in map(int, sys.argv[1:]):
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        with socket.socket(family) as listener:
            if family == socket.AF_INET6: listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try: listener.bind((address, port))
            except OSError as error: sys.exit(f"{address} port {port}: {error}")
            listener.listen()`;
    // Not 15008: there the proxy has the tunnels of other nodes, at the pod's own address.
    const common = [22, 53, 80, 443, 3000, 3306, 5000, 5432, 6379, 8000, 8080, 8443, 9100, 15001, 15006];
    const result = await root.run(['python3', '-c', bind, ...common.map(String)]);
    expect(result.code, result.stderr).toBe(0);
    for (const connection of open) expect(connection.running).toBe(true);
  });

  it.each([false, true])('on 15001, 15006 and 15008 take nothing from the proxy (SO_REUSEPORT: %s)', async (reuse) => {
    const { lab, root, far, stranger } = made;
    const servers = await occupy(MESH_PORTS, reuse);
    try {
      for (const server of servers) expect(server.lines[0]).toEqual({ ready: true });
      for (const address of [root.addresses.v4, root.addresses.v6]) {
        // Captured in, captured out, and what comes in the clear: many, so that a share of them would be seen.
        for (let n = 0; n < 8; n++) {
          expect(await client(far, 'echo', address, PORT.echo)).toEqual({ ok: true });
          expect(await client(stranger, 'echo', address, PORT.echo)).toEqual({ ok: true });
        }
      }
      for (let n = 0; n < 8; n++) {
        expect(await client(root, 'echo', made.neighbour.addresses.v4, PORT.echo)).toEqual({ ok: true });
      }
      await captured(lab, far, root);
      await captured(lab, root, made.neighbour);
      expect(servers.map(accepted)).toEqual([0, 0, 0]);
    } finally {
      for (const server of servers) await server.stop();
    }
  });

  it('work for the pod itself, by loopback and by its own address', async () => {
    const { root, peer } = made;
    const servers = await occupy(MESH_PORTS, false);
    const lines = await inboundSettled();
    try {
      for (const port of MESH_PORTS) {
        for (const address of ['127.0.0.1', '::1', root.addresses.v4, root.addresses.v6]) {
          const result = await connectFrom(peer, root, address, port);
          expect(result, `${address} port ${port}: ${JSON.stringify(result)}`).toMatchObject({ ok: true });
          expect(result.answer).toMatch(/^app /);
        }
      }
      expect(servers.map(accepted)).toEqual([4, 4, 4]);
      expect(await inboundSettled()).toBe(lines);
    } finally {
      for (const server of servers) await server.stop();
    }
  });

  it('are not reached by others through the mesh: these ports are refused at once, and said to be', async () => {
    const { root, far, stranger, peer, lab } = made;
    const servers = await occupy(MESH_PORTS, false);
    try {
      for (const port of MESH_PORTS) {
        const before = await inboundSettled();
        const result = await client(far, 'refused', root.addresses.v4, port, 10);
        expect(['eof', 'ConnectionResetError'], JSON.stringify(result)).toContain(result.outcome);
        expect(Number(result.ms)).toBeLessThan(5000);
        const line = await waitFor('its line', () => inbound()[before], { hint: () => processes(lab) });
        expect(line).toMatchObject({ reason: 'illegal-port', 'src.identity': far.identity });
      }
      for (const port of MESH_PORTS) {
        const result = await connectFrom(peer, stranger, root.addresses.v4, port);
        expect(result.answer ?? '', `${port}: ${JSON.stringify(result)}`).not.toMatch(/app/);
      }
      expect(servers.map(accepted)).toEqual([0, 0, 0]);
    } finally {
      for (const server of servers) await server.stop();
    }
  });

  it('are reached where they are outside of the mesh: an application may have these ports there', async () => {
    const { root, plain, peer } = made;
    for (const port of MESH_PORTS) {
      const server = await serveIn(peer, plain, '::', port);
      try {
        const result = await connectFrom(peer, root, plain.addresses.v4, port);
        expect(result, `${port}: ${JSON.stringify(result)}`).toMatchObject({ ok: true });
        expect(result.answer).toMatch(/^app /);
      } finally {
        await server.stop();
      }
    }
  });

  it("cannot share the proxy's own listeners' ports", async () => {
    const { root, far, peer } = made;
    const ports = await listenersOf(root);
    expect(ports.length).toBeGreaterThanOrEqual(3);
    for (const port of MESH_PORTS) expect(ports).not.toContain(port);
    const servers: Peer[] = [];
    try {
      for (const port of ports) {
        for (const address of ['::', '0.0.0.0', root.addresses.v4, '127.0.0.1']) {
          const server = await serveIn(peer, root, address, port, true);
          servers.push(server);
          expect(server.lines[0], `${address} port ${port}`).toMatchObject({ step: 'bind', errno: 98 });
        }
      }
      await captured(made.lab, far, root);
    } finally {
      for (const server of servers) await server.stop();
    }
  });
});

describe("the proxy's listeners", () => {
  it('in the own pod are not reached by their ports', async () => {
    const { root, peer } = made;
    const lines = await inboundSettled();
    for (const port of await listenersOf(root)) {
      for (const address of ['127.0.0.1', '127.128.1.1', '::1', root.addresses.v4, root.addresses.v6]) {
        const result = await connectFrom(peer, root, address, port);
        expect(result, `${address} port ${port}`).toMatchObject({ ok: false, step: 'connect' });
      }
    }
    expect(await inboundSettled()).toBe(lines);
  });

  it('in another pod are not reached by their ports, from the mesh or from outside of it', async () => {
    const { root, far, stranger, neighbour, peer, lab } = made;
    for (const port of await listenersOf(neighbour)) {
      for (const from of [root, far]) {
        const before = await inboundSettled();
        const result = await client(from, 'refused', neighbour.addresses.v4, port, 10);
        expect(['eof', 'ConnectionResetError'], `${port}: ${JSON.stringify(result)}`).toContain(result.outcome);
        const line = await waitFor('its line', () => inbound()[before], { hint: () => processes(lab) });
        expect(line).toMatchObject({ reason: 'connect-refused', 'src.identity': from.identity });
      }
      const result = await connectFrom(peer, stranger, neighbour.addresses.v4, port);
      expect(result, JSON.stringify(result)).toMatchObject({ ok: false, step: 'connect' });
    }
  });

  it('for HBONE in another pod takes the connection of a captured pod only as one of the mesh', async () => {
    const { root, neighbour, lab } = made;
    const before = await inboundSettled();
    // What root would say to the proxy there is carried as an application's, to port 15008 of an application.
    const result = await client(root, 'refused', neighbour.addresses.v4, HBONE_PORT, 10);
    expect(['eof', 'ConnectionResetError']).toContain(result.outcome);
    const line = await waitFor('its line', () => inbound()[before], { hint: () => processes(lab) });
    expect(line).toMatchObject({ reason: 'illegal-port', 'src.identity': root.identity });
  });
});
