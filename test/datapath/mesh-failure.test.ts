/** What holds when parts of the mesh die, and that nothing is left when it stops. */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  analyseCapture,
  type Inventory,
  type Lab,
  leftSince,
  type Pod,
  sleep,
  takeInventory,
  type WireRecording,
} from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { captured, labWith, pairLab } from '../lib/mesh-lab.ts';
import { Background, client, clientArgv, PORT } from '../lib/peers.ts';

// One story told in order: each test leaves the mesh as the next one finds it.
describe('parts that die', () => {
  let before: Inventory;
  let during: Inventory;
  let made: { near: Pod; server: Pod; lab: Lab };
  let recording: WireRecording;

  beforeAll(async () => {
    before = await takeInventory();
    made = await labWith(pairLab);
    recording = await made.lab.recordWire('failure');
    during = await takeInventory();
  });
  afterAll(() => made?.lab.close());

  for (const number of [1, 2] as const) {
    it(`killing the agent of node${number} with -9 and starting it again changes nothing for traffic`, async () => {
      const { lab, near, server } = made;
      const load = await Background.start(near, 'load', server.addresses.v4, PORT.echo, 7);
      await sleep(1500);
      const node = lab.node(number);
      await node.agent?.stop('SIGKILL');
      await sleep(1500);
      await node.startAgent();
      const said = await load.result();
      expect(said).toMatchObject({ failures: {}, long_lived: true });
      expect(said.done).toBeGreaterThan(100);
      expect(node.agent?.running).toBe(true);
      // The agent that started again still enrols: it did not only leave things alone.
      await captured(lab, near, server);
    });
  }

  for (const [number, side] of [
    [1, "client's"],
    [2, "server's"],
  ] as const) {
    it(`without the proxy of the ${side} node nothing passes; when it is back, connections work again`, async () => {
      const { lab, near, server } = made;
      const node = lab.node(number);
      await node.proxy?.stop('SIGKILL');
      for (const family of ['v4', 'v6'] as const) {
        const probe = await near.run(clientArgv('refused', server.addresses[family], PORT.whoami, 3), {
          timeoutMs: 10_000,
        });
        expect(JSON.parse(probe.stdout).outcome).not.toBe('data');
      }
      await node.startProxy();
      await node.ready();
      await captured(lab, near, server);
      expect(await client(near, 'echo', server.addresses.v6, PORT.echo)).toEqual({ ok: true });
    });
  }

  it('the proxies stop on SIGTERM by themselves, also with connections open', async () => {
    const { lab, near, server } = made;
    const held = await Background.start(near, 'hold', server.addresses.v4, PORT.watch, 60);
    await held.said('open');
    for (const node of lab.nodes) {
      const inTime = await node.proxy?.stop('SIGTERM', 15_000);
      expect(inTime, `${node.name}: ${node.proxy?.tail()}`).toBe(true);
      expect(node.proxy?.exitCode).toBe(0);
    }
    expect((await held.result()).outcome).not.toBe('still open');
    for (const node of lab.nodes) {
      await node.startProxy();
      await node.ready();
    }
    await captured(lab, near, server);
  });

  it('during all of this the wire held nothing but TLS 1.3 to port 15008', async () => {
    const report = analyseCapture(await recording.stop(), ['payload-in-clear', 'marker-']);
    expect(report.markersFound).toEqual([]);
    expect(report.others).toEqual([]);
    const wrong = report.connections.filter(({ serverPort, protocol, payloadBytes }) => {
      const cut = protocol === 'unanswered TLS' || protocol === 'TLS without ServerHello';
      return payloadBytes > 0 && (serverPort !== HBONE_PORT || !(protocol === 'tls1.3' || cut));
    });
    expect(wrong).toEqual([]);
    expect(report.connections.filter(({ protocol }) => protocol === 'tls1.3').length).toBeGreaterThan(2);
  });

  it('after stop and uninstall, nothing is left and pods talk plainly', async () => {
    const { lab, near, server } = made;
    expect(await lab.stopMesh()).toEqual([]);
    for (const node of ['node1', 'node2']) {
      const pins = join(lab.ground.bpffs, node);
      expect(existsSync(pins) ? readdirSync(pins) : []).toEqual([]);
    }
    const bpf = (kind: string, name: string) => kind.startsWith('BPF') && (during[kind]?.has(name) ?? false);
    expect(await leftSince(before, bpf)).toEqual([]);
    expect(await client(near, 'whoami', server.addresses.v4, PORT.whoami)).toMatchObject({ peer: near.addresses.v4 });
    await lab.close();
    expect(await leftSince(before, (kind, name) => name.includes(lab.ground.id) || bpf(kind, name))).toEqual([]);
  });
});
