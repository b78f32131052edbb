/**
 * From where the proxy's own interfaces are reached. They listen in the node's network namespace. Admin (15000) is for the
 * node's loopback only: it can stop the proxy. Metrics (15020) and readiness (15021) listen on every address of the node, as
 * ztunnel's do, because Prometheus and the kubelet must reach them; they only read.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Lab, must, type Pod, placed } from '../../src/lab/index.ts';
import { ADMIN_PORT, METRICS_PORT, READINESS_PORT } from '../../src/mesh/ports.ts';
import { buildPeer, connectFrom, sendRaw } from '../lib/hostile.ts';
import { captured, labWith } from '../lib/mesh-lab.ts';
import { client, startServer } from '../lib/peers.ts';
import { Peer } from './capture/lab.ts';

async function portsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const root = await lab.pod({ name: 'root', namespace: 'meshed', node: 2 });
  const neighbour = await lab.pod({ name: 'neighbour', namespace: 'meshed', node: 2 });
  const far = await lab.pod({ name: 'far', namespace: 'meshed', node: 1 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  const plain = await lab.pod({ name: 'plain', namespace: 'plain', node: 2 });
  await startServer(root);
  await lab.startMesh();
  await captured(lab, far, root);
  const peer = await buildPeer(lab);
  return { root, neighbour, far, stranger, plain, peer };
}

let made: Awaited<ReturnType<typeof portsLab>> & { lab: Lab };
beforeAll(async () => {
  made = await labWith(portsLab);
});
afterAll(() => made?.lab.close());

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
    const { lab, root, plain, peer } = made;
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
    const other = new Peer(['nsenter', `--net=${node.place.netns}`, peer, 'serve', '127.0.0.1', '15099']);
    await other.next((line) => line.ready === true);
    try {
      for (const pod of [root, plain]) {
        await must(placed(pod.place, ['sh', '-c', ROUTE_LOOPBACK_OUT]));
        const reached = await connectFrom(peer, pod, '127.0.0.1', 15099);
        const result = await http(pod, '127.0.0.1', ADMIN_PORT, '/config_dump');
        await must(placed(pod.place, ['sh', '-c', ROUTE_LOOPBACK_BACK]));
        // What else listens on the node's loopback is reached from where nothing guards: so this is a way in.
        expect(reached.ok, `${pod.id}: ${JSON.stringify(reached)}`).toBe(pod === plain);
        expect(result.code, `${pod.id}: ${result.stdout}`).not.toBe(0);
        expect(result.stdout).toBe('');
      }
      await sendRaw(lab, root, 'bypass', '127.0.0.1', ADMIN_PORT, 'GET /config_dump HTTP/1.1\r\n\r\n');
    } finally {
      await other.stop();
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
  });
});

/** Lets a pod send packets for 127.0.0.1 to its gateway. */
const ROUTE_LOOPBACK_OUT = `
for f in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/route_localnet; done
ip route add 127.0.0.1/32 via 169.254.1.1 dev eth0 src "$(ip -4 -o addr show dev eth0 | awk '{print $4}' | cut -d/ -f1)" table 100
ip rule add pref 100 to 127.0.0.1 lookup 100
ip rule add pref 200 lookup local
ip rule del pref 0`;
const ROUTE_LOOPBACK_BACK = 'ip rule add pref 0 lookup local; ip rule del pref 200; ip rule del pref 100';
