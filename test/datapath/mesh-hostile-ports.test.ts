/** What of the proxy root in a captured pod can take or reach: its ports, its listeners, those of other pods, its interfaces. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type AccessLine, type Lab, must, type Pod, placed, run, waitFor } from '../../src/lab/index.ts';
import { ADMIN_PORT, HBONE_PORT, METRICS_PORT, READINESS_PORT } from '../../src/mesh/ports.ts';
import { buildPeer, connectFrom, proxyListeners, sendRaw, serveIn } from '../lib/hostile.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { client, PORT, startServer } from '../lib/peers.ts';
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
const listenersOf = (pod: Pod) => proxyListeners(pod, made.lab.node(pod.node).proxy?.pid ?? 0);
const accepted = (server: Peer): number => server.lines.filter((line) => 'accepted' in line).length;

/** Listeners of root's own on every port of the mesh, in both families. */
async function occupy(ports: readonly number[], reusePort: boolean): Promise<Peer[]> {
  const servers: Peer[] = [];
  for (const port of ports) servers.push(await serveIn(made.peer, made.root, '::', port, reusePort));
  return servers;
}

describe('listeners of root in a captured pod', () => {
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
    const lines = inbound().length;
    try {
      for (const port of MESH_PORTS) {
        for (const address of ['127.0.0.1', '::1', root.addresses.v4, root.addresses.v6]) {
          const result = await connectFrom(peer, root, address, port);
          expect(result, `${address} port ${port}: ${JSON.stringify(result)}`).toMatchObject({ ok: true });
          expect(result.answer).toMatch(/^app /);
        }
      }
      expect(servers.map(accepted)).toEqual([4, 4, 4]);
      expect(inbound()).toHaveLength(lines);
    } finally {
      for (const server of servers) await server.stop();
    }
  });

  it('are not reached by others through the mesh: these ports are refused at once, and said to be', async () => {
    const { root, far, stranger, peer, lab } = made;
    const servers = await occupy(MESH_PORTS, false);
    try {
      for (const port of MESH_PORTS) {
        const before = inbound().length;
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
    const lines = inbound().length;
    for (const port of await listenersOf(root)) {
      for (const address of ['127.0.0.1', '127.128.1.1', '::1', root.addresses.v4, root.addresses.v6]) {
        const result = await connectFrom(peer, root, address, port);
        expect(result, `${address} port ${port}`).toMatchObject({ ok: false, step: 'connect' });
      }
    }
    expect(inbound()).toHaveLength(lines);
  });

  it('in another pod are not reached by their ports, from the mesh or from outside of it', async () => {
    const { root, far, stranger, neighbour, peer, lab } = made;
    for (const port of await listenersOf(neighbour)) {
      for (const from of [root, far]) {
        const before = inbound().length;
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
    const before = inbound().length;
    // What root would say to the proxy there is carried as an application's, to port 15008 of an application.
    const result = await client(root, 'refused', neighbour.addresses.v4, HBONE_PORT, 10);
    expect(['eof', 'ConnectionResetError']).toContain(result.outcome);
    const line = await waitFor('its line', () => inbound()[before], { hint: () => processes(lab) });
    expect(line).toMatchObject({ reason: 'illegal-port', 'src.identity': root.identity });
  });
});

describe("the proxy's interfaces on the node", () => {
  const NODE = { v4: '172.30.0.2', v6: 'fd00:30::2' };
  const http = (pod: Pod, address: string, port: number, path: string, method = 'GET') => {
    const host = address.includes(':') ? `[${address}]` : address;
    return pod.run(['curl', '-sS', '-X', method, '--fail', '--max-time', '4', `http://${host}:${port}${path}`]);
  };

  it('are there: what is not reached below is kept away', async () => {
    const node = made.lab.node(2);
    expect((await node.fetch(ADMIN_PORT, '/config_dump')).code).toBe(0);
    expect((await node.fetch(METRICS_PORT, '/metrics')).code).toBe(0);
    expect((await node.fetch(READINESS_PORT, '/healthz/ready')).code).toBe(0);
  });

  it('none is in a pod: not on its loopback, nor on its address', async () => {
    const { root, stranger } = made;
    for (const pod of [root, stranger]) {
      for (const port of [ADMIN_PORT, METRICS_PORT, READINESS_PORT]) {
        for (const address of ['127.0.0.1', '::1', pod.addresses.v4, pod.addresses.v6]) {
          const result = await http(pod, address, port, '/');
          expect(result.code, `${pod.id} ${address} ${port}: ${result.stderr}`).toBe(7);
        }
      }
    }
  });

  it.each([ADMIN_PORT, METRICS_PORT, READINESS_PORT])("port %d of another pod's address is nobody's", async (port) => {
    const { root, far, neighbour } = made;
    for (const pod of [root, far]) {
      const result = await client(pod, 'refused', neighbour.addresses.v4, port, 10);
      expect(['eof', 'ConnectionResetError'], JSON.stringify(result)).toContain(result.outcome);
    }
  });

  it("the admin interface is not reached by the node's addresses", async () => {
    const { root, far, stranger } = made;
    for (const pod of [root, far, stranger]) {
      for (const address of [NODE.v4, NODE.v6, '169.254.1.1']) {
        for (const [path, method] of [
          ['/config_dump', 'GET'],
          ['/quitquitquit', 'POST'],
        ] as const) {
          const result = await http(pod, address, ADMIN_PORT, path, method);
          expect(result.code, `${pod.id} ${address}: ${result.stdout}${result.stderr}`).not.toBe(0);
          expect(result.stdout).toBe('');
        }
      }
    }
    expect(made.lab.node(2).proxy?.running).toBe(true);
  });

  // Some network plugins and kube-proxy set route_localnet, with which a node takes packets for 127.0.0.1 from outside.
  it("the admin interface is not reached by the node's loopback, also where the node routes that", async () => {
    const { lab, root, plain } = made;
    const node = lab.node(2);
    const sysctl = (value: number) =>
      must(
        placed(node.place, [
          'sh',
          '-c',
          `for f in /proc/sys/net/ipv4/conf/*/route_localnet; do echo ${value} >$f; done`,
        ]),
      );
    await sysctl(1);
    try {
      for (const pod of [root, plain]) {
        await must(placed(pod.place, ['sh', '-c', ROUTE_LOOPBACK_OUT]));
        const result = await http(pod, '127.0.0.1', ADMIN_PORT, '/config_dump');
        await must(placed(pod.place, ['sh', '-c', ROUTE_LOOPBACK_BACK]));
        expect(result.code, `${pod.id}: ${result.stdout}`).not.toBe(0);
        expect(result.stdout).toBe('');
      }
      await sendRaw(lab, root, 'bypass', '127.0.0.1', ADMIN_PORT, 'GET /config_dump HTTP/1.1\r\n\r\n');
    } finally {
      await sysctl(0);
    }
    await captured(lab, made.far, root);
  });

  it("metrics and readiness answer on the node's address, as whoever scrapes them needs, and give nothing else", async () => {
    const { root, stranger } = made;
    for (const pod of [root, stranger]) {
      const metrics = await http(pod, NODE.v4, METRICS_PORT, '/metrics');
      expect(metrics.code, metrics.stderr).toBe(0);
      expect(metrics.stdout).toContain('istio_build');
      const ready = await http(pod, NODE.v6, READINESS_PORT, '/healthz/ready');
      expect(ready.code, ready.stderr).toBe(0);
      for (const [port, path, method] of [
        [METRICS_PORT, '/config_dump', 'GET'],
        [METRICS_PORT, '/quitquitquit', 'POST'],
        [METRICS_PORT, '/logging?level=trace', 'POST'],
        [READINESS_PORT, '/quitquitquit', 'POST'],
        [READINESS_PORT, '/config_dump', 'GET'],
        [METRICS_PORT, '/metrics', 'POST'],
      ] as const) {
        const result = await http(pod, NODE.v4, port, path, method);
        expect(result.code, `${method} ${path} on ${port}: ${result.stdout}`).toBe(22);
      }
    }
    expect(made.lab.node(2).proxy?.running).toBe(true);
    expect((await run(placed(made.lab.node(2).place, ['true']))).code).toBe(0);
  });
});

/** Lets a pod send packets for 127.0.0.1 to its gateway. */
const ROUTE_LOOPBACK_OUT = `
ip rule add pref 100 lookup main; ip rule del pref 0
ip addr del 127.0.0.1/8 dev lo 2>/dev/null
echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet
ip route del table local 127.0.0.0/8 2>/dev/null; ip route del table local 127.0.0.1 2>/dev/null
ip route add 127.0.0.1/32 via 169.254.1.1 dev eth0 src "$(ip -4 -o addr show dev eth0 | awk '{print $4}' | cut -d/ -f1)"`;
const ROUTE_LOOPBACK_BACK = `
ip route del 127.0.0.1/32 dev eth0; ip addr add 127.0.0.1/8 dev lo; ip rule add pref 0 lookup local; ip rule del pref 100`;
