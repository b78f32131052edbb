/** Root in a captured pod tries to leave the mesh; the wire between the nodes tells whether it could. */
import { mkdirSync, readFileSync, rmdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { type AccessLine, analyseCapture, type Lab, type WireReport, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { buildPeer, connectFrom, RAW_PORT, sendRaw, serveIn } from '../lib/hostile.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { startServer } from '../lib/peers.ts';

const APP = 8080;
/** Where nobody listens, so that nothing but the packets themselves can be seen of it. */
const NOWHERE = 4242;

async function hostileLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const root = await lab.pod({ name: 'root', namespace: 'meshed', node: 1 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  const recording = await lab.recordWire('hostile');
  await lab.startMesh();
  await captured(lab, root, server);
  const peer = await buildPeer(lab);
  return { root, stranger, server, peer, recording };
}

interface Way {
  readonly name: string;
  readonly options: readonly string[];
  readonly to?: 'v6' | 'mapped';
}

const WAYS: readonly Way[] = [
  { name: 'an ordinary connect', options: [] },
  { name: 'an ordinary connect over IPv6', options: [], to: 'v6' },
  { name: 'a mapped address', options: [], to: 'mapped' },
  { name: 'without blocking', options: ['nonblock'] },
  { name: 'bound to its own address and port', options: ['bind=OWN/5555'] },
  { name: 'SO_MARK', options: ['mark=1337'] },
  { name: 'SO_MARK as Istio marks its own', options: ['mark=1338'] },
  { name: 'SO_BINDTODEVICE', options: ['device=eth0'] },
  { name: 'SO_BINDTODEVICE over IPv6', options: ['device=eth0'], to: 'v6' },
  { name: 'as the user that Istio runs its proxy as', options: ['setuid=1337'] },
  { name: 'as nobody', options: ['setuid=65534'] },
  { name: 'MPTCP', options: ['mptcp'] },
  { name: 'MPTCP over IPv6', options: ['mptcp'], to: 'v6' },
  { name: 'MSG_FASTOPEN', options: ['fastopen'] },
  { name: 'MSG_FASTOPEN over IPv6', options: ['fastopen'], to: 'v6' },
  { name: 'TCP_FASTOPEN_CONNECT', options: ['deferred'] },
  { name: 'io_uring', options: ['uring'] },
  { name: 'AF_UNSPEC after a connection to itself, and again', options: ['again=7001'] },
  { name: 'AF_UNSPEC and again, over IPv6 with a mark', options: ['again=7001', 'mark=1337'], to: 'v6' },
  { name: 'a cgroup of its own', options: ['cgroup=OWN_CGROUP/cgroup.procs'] },
  { name: "the proxy's cgroup", options: ['cgroup=PROXY_CGROUP/cgroup.procs'] },
];

const RAW_WAYS = [
  ['raw', 'v4'],
  ['raw', 'v6'],
  ['packet', 'v4'],
  ['packet', 'v6'],
  ['bypass', 'v4'],
  ['bypass', 'v6'],
  ['vlan', 'v4'],
  ['fragments', 'v4'],
  ['ipip', 'v4'],
  ['options', 'v6'],
] as const;
/** What leaves a pod that is not captured, and would be seen on the wire if it left a captured one. */
const LEAVES_A_STRANGER: readonly string[] = ['raw', 'packet', 'bypass'];

describe('root in a captured pod', () => {
  let made: Awaited<ReturnType<typeof hostileLab>> & { lab: Lab };
  const markers: string[] = [];
  beforeAll(async () => {
    made = await labWith(hostileLab);
  });
  afterAll(() => made?.lab.close());

  const inbound = (): AccessLine[] =>
    made.lab
      .node(2)
      .accessLog()
      .filter((line) => line.direction === 'inbound');
  const marker = (name: string): string => {
    const text = `marker-${name.replaceAll(' ', '-')}`;
    markers.push(text);
    return text;
  };

  it.each(WAYS)('arrives as itself by HBONE: $name', async ({ name, options, to }) => {
    const { lab, root, server, peer } = made;
    const address =
      to === 'v6' ? server.addresses.v6 : to === 'mapped' ? `::ffff:${server.addresses.v4}` : server.addresses.v4;
    const cgroup = join(root.place.cgroup, 'own');
    mkdirSync(cgroup);
    const app = await serveIn(peer, server, '::', APP);
    const self = await serveIn(peer, root, '::', 7001);
    const text = marker(name);
    const before = inbound().length;
    try {
      const filled = options.map((option) =>
        option
          .replace('OWN_CGROUP', cgroup)
          .replace('PROXY_CGROUP', lab.node(1).place.cgroup)
          .replace('OWN', root.addresses.v4),
      );
      const result = await connectFrom(peer, root, address, APP, ...filled, `say=${text}`);
      const own = to === 'v6' ? root.addresses.v6 : root.addresses.v4;
      expect(result, JSON.stringify(result)).toMatchObject({ ok: true });
      expect(result.answer?.replace('::ffff:', '')).toMatch(/^app /);
      expect(result.answer).toContain(own);
      const line = await waitFor('the line of the connection', () => inbound()[before], {
        hint: () => processes(lab),
      });
      expect(line).toMatchObject({ 'src.identity': root.identity, 'src.workload': 'root', response_flags: '-' });
      expect(line['dst.addr']).toContain(`:${APP}`);
      // Both directions went through the tunnel, the whole text too.
      expect(line.bytes_recv ?? line.bytes_sent).toBeGreaterThan(0);
      expect(Math.max(Number(line.bytes_sent), Number(line.bytes_recv))).toBeGreaterThanOrEqual(text.length);
      expect(inbound()).toHaveLength(before + 1);
    } finally {
      await app.stop();
      await self.stop();
      rmdirSync(cgroup);
    }
  });

  it('io_uring was tried in earnest', () => {
    expect(readFileSync('/proc/sys/kernel/io_uring_disabled', 'utf8').trim()).not.toBe('2');
  });

  it.each(RAW_WAYS)('does not leave by hand-made packets: %s over %s', async (kind, family) => {
    const { lab, root, server } = made;
    const drops = () => guardDrops(lab);
    const before = await drops();
    let sent = 0;
    for (const port of [NOWHERE, APP, HBONE_PORT]) {
      sent += await sendRaw(lab, root, kind, server.addresses[family], port, marker(`raw ${kind} ${family} ${port}`));
    }
    expect(sent).toBeGreaterThanOrEqual(9);
    // A bare segment of no connection may pass where it carries nothing; whatever begins or carries something may not.
    expect((await drops()) - before).toBeGreaterThanOrEqual(9);
  });

  it('is seen on the wire when it is not captured: the recording misses nothing', async () => {
    const { lab, stranger, server, peer } = made;
    const app = await serveIn(peer, server, '::', APP);
    try {
      await connectFrom(peer, stranger, server.addresses.v4, APP, 'say=control-plain');
      for (const kind of LEAVES_A_STRANGER) {
        for (const family of ['v4', 'v6'] as const) {
          await sendRaw(lab, stranger, kind, server.addresses[family], NOWHERE, `control-${kind}-${family}`);
        }
      }
    } finally {
      await app.stop();
    }
  });

  it('has put nothing in clear on the wire, and no SYN of its own', async () => {
    const { root, stranger } = made;
    const file = await made.recording.stop();
    const controls = LEAVES_A_STRANGER.flatMap((kind) => [`control-${kind}-v4`, `control-${kind}-v6`]);
    const report = analyseCapture(file, [...markers, 'control-plain', ...controls]);
    expect(markers.length).toBeGreaterThan(WAYS.length + RAW_WAYS.length);
    expect(report.markersFound.map((found) => found.marker).sort()).toEqual(['control-plain', ...controls].sort());
    const ofRoot = from(report, root.addresses.v4, root.addresses.v6);
    expect(ofRoot.length).toBeGreaterThan(0);
    for (const connection of ofRoot) {
      expect(connection).toMatchObject({ serverPort: HBONE_PORT, protocol: 'tls1.3' });
      expect(connection.client).not.toMatch(new RegExp(`:${RAW_PORT}$`));
    }
    const handmade = from(report, stranger.addresses.v4, stranger.addresses.v6).filter(({ client }) =>
      client.endsWith(`:${RAW_PORT}`),
    );
    expect(handmade.length).toBeGreaterThanOrEqual(2);
    expect(report.others).toEqual([]);
  });

  it('has left the mesh as it was', () => captured(made.lab, made.root, made.server));
});

/** Connections that a pod began; the report spells IPv6 in full. */
function from(report: WireReport, v4: string, v6: string): WireReport['connections'] {
  return report.connections.filter(({ client }) => {
    const { hostname } = new URL(`http://${client.slice(0, client.lastIndexOf(':'))}/`);
    return hostname === v4 || hostname === `[${v6}]`;
  });
}

/** Packets of all pods of node 1 that the guard has dropped. */
async function guardDrops(lab: Lab): Promise<number> {
  const { pods } = await readStatus(join(lab.ground.directory, 'node1.sock.status'));
  return pods.reduce((sum, { capture }) => sum + Number(capture?.guardDrops ?? 0), 0);
}
