/** What the mesh does while its controller is away, and how it catches up. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { authorizationPolicy, type Lab, type Pod, sleep, waitFor } from '../../src/lab/index.ts';
import { startController } from '../../src/lab/mesh.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { Background, client, clientArgv, PORT, startServer } from '../lib/peers.ts';

/** From the controller's return: the proxies' longest pause between two attempts is 5 s, and they start themselves. */
const BACK_WITHIN_MS = 15_000;

async function awayLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  const near = await lab.pod({ name: 'client', namespace: 'meshed', node: 1 });
  const other = await lab.pod({ name: 'other', namespace: 'meshed', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  const spare = await lab.pod({ name: 'spare', namespace: 'meshed', node: 2 });
  await startServer(server);
  await startServer(spare);
  const ports = [{ port: 80, targetPort: PORT.whoami }];
  const service = await lab.service({ name: 'server', namespace: 'meshed', pods: [server], ports });
  await lab.startMesh();
  for (const from of [near, other]) for (const to of [server, spare]) await captured(lab, from, to);
  return { near, other, server, spare, service };
}

// One story told in order: each test leaves the mesh as the next one finds it.
describe('a controller that is away', () => {
  let made: Awaited<ReturnType<typeof awayLab>> & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(awayLab);
  });
  afterAll(() => made?.lab.close());

  const outcome = async (from: Pod, address: string, port: number = PORT.whoami): Promise<string> => {
    const probe = await from.run(clientArgv('refused', address, port, 12), { timeoutMs: 20_000 });
    return String((JSON.parse(probe.stdout) as { outcome: string }).outcome);
  };
  const back = async (lab: Lab) => {
    lab.controller = await startController(lab.ground, {});
  };
  /** What the controller that runs now has heard when each proxy connected again, by type. */
  const subscriptions = (lab: Lab): { type: string; initialVersions: number; node: string }[] =>
    logLines(lab)
      .filter((line) => line.event === 'xds_subscribed')
      .map((line) => line as unknown as { type: string; initialVersions: number; node: string });

  it('killed with -9 under load, together with an agent, and started again: no connection fails', async () => {
    const { lab, near, server } = made;
    const load = await Background.start(near, 'load', server.addresses.v4, PORT.echo, 12);
    await sleep(2000);
    await lab.controller?.stop('SIGKILL');
    await lab.node(1).agent?.stop('SIGKILL');
    await sleep(4000);
    // The long absence is over before the load is: its return must break nothing either.
    await lab.node(1).startAgent();
    await back(lab);
    const said = await load.result();
    expect(said).toMatchObject({ failures: {}, long_lived: true });
    expect(said.done).toBeGreaterThan(100);
    for (const node of lab.nodes) expect(node.proxy?.running).toBe(true);
  });

  it('what changed while it was away is applied when it is back, removals too', async () => {
    const { lab, near, other, server, spare, service } = made;
    await waitFor('both proxies to be connected again', () => connected(lab, 2), { hint: () => processes(lab) });
    await waitFor('the Service to answer', async () => (await outcome(near, service.v4, 80)) === 'data');
    const denied = authorizationPolicy('deny-other', 'meshed', {
      action: 'DENY',
      rules: [{ from: [{ source: { principals: ['*/sa/other'] } }] }],
    });
    const kept = authorizationPolicy('deny-client-watch', 'meshed', {
      action: 'DENY',
      rules: [{ from: [{ source: { principals: ['*/sa/client'] } }], to: [{ operation: { ports: ['9007'] } }] }],
    });
    lab.manifests.write(kept);
    await waitFor('the policy to act', async () => (await outcome(near, server.addresses.v4, PORT.watch)) !== 'data');
    await lab.controller?.stop('SIGKILL');
    const held = await Background.start(other, 'hold', server.addresses.v4, PORT.watch, 40);
    await held.said('open');
    const serviceFile = { apiVersion: 'v1', kind: 'Service', metadata: { name: 'server', namespace: 'meshed' } };
    lab.manifests.write(denied);
    lab.manifests.remove(kept, serviceFile, spare.manifest);
    // Nobody tells the proxies: what they know stays in force.
    await sleep(2000);
    expect(held.running).toBe(true);
    expect(await outcome(other, server.addresses.v4)).toBe('data');
    expect(await outcome(near, server.addresses.v4, PORT.watch)).not.toBe('data');
    expect(await outcome(near, service.v4, 80)).toBe('data');

    await back(lab);
    const cut = await held.result();
    expect(['reset', 'eof'], JSON.stringify(cut)).toContain(cut.outcome);
    await waitFor('other to be refused', async () => (await outcome(other, server.addresses.v4)) !== 'data');
    await waitFor('the removed policy to end', async () => {
      return (await outcome(near, server.addresses.v4, PORT.watch)) === 'data';
    });
    for (const node of lab.nodes) {
      await waitFor(
        `${node.name} to forget what was removed`,
        async () => {
          const dump = await node.configDump();
          const names = (list: unknown) => (list as { name: string }[]).map(({ name }) => name);
          const has = [...names(dump.workloads), ...names(dump.services), ...names(dump.policies)];
          return (
            !has.includes('spare') && !names(dump.services).includes('server') && !has.includes('deny-client-watch')
          );
        },
        { hint: () => processes(lab) },
      );
    }
    expect(await outcome(near, server.addresses.v4)).toBe('data');
    // They said what they had, and were told the difference only.
    const said = subscriptions(lab);
    expect(said.length).toBeGreaterThanOrEqual(4);
    for (const { initialVersions, type } of said) expect(initialVersions, type).toBeGreaterThan(0);
    lab.manifests.remove(denied);
    lab.manifests.write(spare.manifest);
    await captured(lab, other, spare);
  });

  for (const [number, side] of [
    [1, "client's"],
    [2, "server's"],
  ] as const) {
    it(`a proxy of the ${side} node that starts without it refuses everything, says why, and recovers by itself`, async () => {
      const { lab, near, server } = made;
      const node = lab.node(number);
      await lab.controller?.stop('SIGKILL');
      await node.proxy?.stop('SIGKILL');
      const start = readFileSync(node.log('proxy'), 'utf8').length;
      const startedAt = Date.now();
      await node.startProxy();
      const said = () => readFileSync(node.log('proxy'), 'utf8').slice(start);
      await waitFor('the proxy to say that the controller is not there', () => said().includes('nothing is known yet'));
      await waitFor('the proxy to have its pods', () => said().includes('"event":"zds_snapshot"'));
      const families = ['v4', 'v6'] as const;
      const outcomes = await Promise.all(families.map((family) => outcome(near, server.addresses[family])));
      expect(outcomes).not.toContain('data');
      const ready = await node.fetch(15021, '/healthz/ready');
      expect(ready.code).not.toBe(0);
      const refusals = node.accessLog().filter(({ time }) => Date.parse(String(time)) >= startedAt);
      const reasons = refusals.map(({ reason }) => String(reason));
      expect(reasons.filter((reason) => !['unknown-local-workload', 'no-certificate'].includes(reason))).toEqual([]);
      expect(reasons.length, node.proxy?.tail(30)).toBeGreaterThan(0);
      expect(String(refusals.at(-1)?.hint)).toMatch(/controller|certificate authority/);

      const returned = performance.now();
      await back(lab);
      await waitFor('traffic to pass again', async () => (await outcome(near, server.addresses.v4)) === 'data', {
        hint: () => processes(lab),
      });
      expect(performance.now() - returned).toBeLessThan(BACK_WITHIN_MS);
      await captured(lab, near, server);
      await node.ready();
      expect(await client(near, 'echo', server.addresses.v6, PORT.echo)).toEqual({ ok: true });
    });
  }
});

function logLines(lab: Lab): Record<string, unknown>[] {
  const lines = readFileSync(lab.controller?.log ?? '', 'utf8')
    .split('\n')
    .flatMap((line) => (line.startsWith('{') ? [JSON.parse(line) as Record<string, unknown>] : []));
  // The file holds what controllers before this one wrote, too.
  const started = lines.findLastIndex(({ event }) => event === 'listening');
  return lines.slice(started);
}

/** Whether so many nodes have a stream to the controller that runs now. */
function connected(lab: Lab, count: number): boolean {
  const nodes = logLines(lab).flatMap(({ event, node }) => (event === 'xds_opened' ? [node] : []));
  return new Set(nodes).size >= count;
}
