/** Nodes and pods that have no IPv4 address at all. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { analyseCapture, authorizationPolicy, peerAuthentication, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { PORT } from '../lib/peers.ts';
import { Pair, type VmPod } from './lib/index.ts';

describe('two guests with IPv6 only', () => {
  let pair: Pair;
  let client: VmPod;
  let stranger: VmPod;
  let server: VmPod;
  beforeAll(async () => {
    pair = await Pair.boot({ families: 'only6' });
    await pair.namespace('meshed', true);
    await pair.namespace('plain', false);
    client = await pair.pod(pair.first, 'client', 'meshed');
    stranger = await pair.pod(pair.first, 'stranger', 'plain');
    server = await pair.pod(pair.second, 'server', 'meshed');
    await pair.second.startServer(server);
    await pair.write(peerAuthentication('strict', 'meshed', 'STRICT'));
    await pair.startMesh();
  });
  afterAll(() => pair?.close());

  it('are without IPv4', async () => {
    expect(await pair.second.guest.must('ip -4 -brief address show scope global')).toBe('');
    expect((await pair.second.run(server, ['ip', '-4', '-brief', 'address', 'show', 'scope', 'global'])).stdout).toBe(
      '',
    );
  });

  it('carry what captured pods say, and the server sees the client', async () => {
    const first = await pair.first.client(client, 'until-answered', server.addresses.v6, PORT.whoami, 60);
    expect(first.ms).not.toBeNull();
    const seen = await pair.first.client(client, 'whoami', server.addresses.v6, PORT.whoami);
    expect(seen).toMatchObject({ peer: client.addresses.v6, remote: server.addresses.v6 });
    const load = await pair.first.client(client, 'load', server.addresses.v6, PORT.echo, 3);
    expect(load).toMatchObject({ failures: {}, long_lived: true });
  });

  it('refuse a client in clear, and whom a policy names by address', async () => {
    await waitFor('the client in clear to be refused', async () => {
      const now = await pair.first.client(stranger, 'refused', server.addresses.v6, PORT.whoami, 10);
      return now.outcome !== 'data';
    });
    const ipBlocks = [`${client.addresses.v6}/128`];
    await pair.write(
      authorizationPolicy('no-client', 'meshed', { action: 'DENY', rules: [{ from: [{ source: { ipBlocks } }] }] }),
    );
    await waitFor('the client to be refused', async () => {
      const now = await pair.first.client(client, 'refused', server.addresses.v6, PORT.whoami, 10);
      return now.outcome !== 'data';
    });
  });

  it('show nothing but TLS 1.3 between captured pods, from boot to power-off', async () => {
    await pair.powerOff();
    const report = analyseCapture(pair.recording, ['payload-in-clear']);
    expect(report.markersFound).toEqual([]);
    const tunnels = report.connections.filter(({ serverPort }) => serverPort === HBONE_PORT);
    expect(tunnels.filter(({ protocol }) => protocol === 'tls1.3').length).toBeGreaterThan(0);
    expect(tunnels.filter(({ protocol }) => !['tls1.3', 'empty'].includes(protocol))).toEqual([]);
    expect(report.others).toEqual([]);
  });
});
