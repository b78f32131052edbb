/**
 * A node loses its power while it is under load, and comes back: pods before, with and after the agent, with and without the
 * boot guard. A stranger in clear hammers a pod of a STRICT namespace all the while.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { analyseCapture, peerAuthentication, sleep, waitFor } from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { figure } from '../kubernetes/lib/report.ts';
import { PORT } from '../lib/peers.ts';
import { isOf, Pair, type VmPod } from './lib/index.ts';

const GUARD = '/ebbtide/native/build/Release/ebbtide-boot-guard';
/** Pods are held from their first instant, as by an agent on the Kubernetes API. */
const AGENT_FLAGS = ['--hold', 'refuse', '--keep'];
/** How long pods run before the agent is started, where they are first. */
const HEAD_START_MS = 5000;
const LONG_S = 600;

type Order = 'before' | 'with' | 'after';

describe('a node whose power is cut', () => {
  let pair: Pair;
  let client: VmPod;
  let stranger: VmPod;
  let target: VmPod;
  let server: VmPod;
  let caller: VmPod;
  beforeAll(async () => {
    pair = await Pair.boot();
    await pair.namespace('meshed', true);
    await pair.namespace('plain', false);
    // In the mesh, and open to callers in clear: what a caller that is not captured says is on the wire.
    await pair.namespace('open', true);
    await pair.write(peerAuthentication('strict', 'meshed', 'STRICT'));
    client = await pair.pod(pair.first, 'client', 'meshed');
    target = await pair.pod(pair.first, 'target', 'open');
    stranger = await pair.pod(pair.first, 'stranger', 'plain');
    await pair.first.startServer(target);
    server = await pair.pod(pair.second, 'server', 'meshed');
    caller = await pair.pod(pair.second, 'caller', 'meshed');
    await pair.second.startServer(server);
    await pair.startMesh(AGENT_FLAGS);
    const first = await pair.first.client(client, 'until-answered', server.addresses.v4, PORT.whoami, 60);
    expect(first.ms).not.toBeNull();
    await waitFor('strangers to be refused', async () => {
      return (await pair.first.client(stranger, 'refused', server.addresses.v4, PORT.whoami, 5)).outcome !== 'data';
    });
  });
  afterAll(() => pair?.close());

  /** The node's pods start, as a kubelet would start them: one calls out at once. */
  async function startPods(): Promise<void> {
    for (const pod of [server, caller]) await pair.second.makePod(pod);
    pair.second.background(caller, 'hammer', target.addresses.v4, PORT.whoami, LONG_S);
    await pair.second.startServer(server);
  }

  function startAgent(): void {
    pair.second.startAgent(...AGENT_FLAGS);
    pair.second.startProxy();
  }

  /** @returns what was seen from the cut until the client was served again and three seconds more */
  async function reboot(order: Order, guarded: boolean) {
    const { first, second } = pair;
    const load = first.background(client, 'load', server.addresses.v4, PORT.echo, LONG_S);
    const hammer = first.background(stranger, 'hammer', server.addresses.v4, PORT.whoami, LONG_S);
    await sleep(2000);
    expect(hammer.process.stderr).not.toContain('answered');
    await second.guest.cut();
    const cutMs = Date.now();
    await second.guest.booted();
    await second.setUp();
    if (guarded) {
      const said = await second.guest.run([GUARD, 'guard', '--node', second.name, '--timeout', '150'], {
        timeoutMs: 180_000,
      });
      expect(said, said.stderr).toMatchObject({ code: 0 });
    }
    if (order === 'after') {
      startAgent();
      await second.ready();
    }
    const served = first.background(client, 'until-answered', server.addresses.v4, PORT.whoami, 240);
    const began = performance.now();
    if (order === 'with') startAgent();
    await startPods();
    if (order === 'before') {
      await sleep(HEAD_START_MS);
      startAgent();
    }
    await second.ready();
    const report = await served.report;
    const servedMs = performance.now() - began;
    expect(report.ms, await pair.logs()).not.toBeNull();
    await sleep(3000);
    for (const each of [load, hammer]) each.process.kill(9);
    const answered = hammer.process.stderr.includes('answered');
    // Since the cut; packets of before are of connections that were captured. What the stranger says it says in clear.
    const clear = analyseCapture(pair.recording, []).connections.filter(
      ({ startedMs, serverPort, payloadBytes, client, server: to }) =>
        startedMs >= cutMs - 500 &&
        payloadBytes > 0 &&
        serverPort !== HBONE_PORT &&
        isOf([server, caller], client, to) &&
        !isOf([stranger], client),
    );
    const bytes = clear.reduce((sum, { payloadBytes }) => sum + payloadBytes, 0);
    const title = `power cut, pods ${order} the agent, ${guarded ? 'boot guard' : 'no boot guard'}`;
    figure(
      title,
      `boot ${Math.round(second.guest.bootMs)} ms, first pod to first success ${Math.round(servedMs)} ms, in clear ${bytes} bytes of ` +
        `${clear.length} connections, stranger ${answered ? 'was ANSWERED' : 'never answered'}`,
    );
    return { answered, bytes, clear };
  }

  for (const order of ['before', 'with', 'after'] as const) {
    it(`comes back with its boot guard, pods ${order} the agent: not a byte in clear, and captured by itself`, async () => {
      const seen = await reboot(order, true);
      expect(seen.clear).toEqual([]);
      expect(seen.answered).toBe(false);
    });
  }

  it('comes back without a boot guard, pods after the agent: not a byte in clear', async () => {
    const seen = await reboot('after', false);
    expect(seen.clear).toEqual([]);
    expect(seen.answered).toBe(false);
  });

  it('without a boot guard, pods that start before the agent speak in clear until they are captured, and not after', async () => {
    const seen = await reboot('before', false);
    // What the guard is for. Were it not so, the tests above would show nothing.
    expect(seen.bytes).toBeGreaterThan(0);
    const now = await pair.first.client(stranger, 'refused', server.addresses.v4, PORT.whoami, 5);
    expect(now.outcome).not.toBe('data');
  });
});
