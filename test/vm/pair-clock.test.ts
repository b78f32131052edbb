/** A node whose clock is wrong: it is told so by log and check, and serves as soon as the clock is set right. */
import { afterEach, describe, expect, it } from 'vitest';
import { waitFor } from '../../src/lab/index.ts';
import { figure } from '../kubernetes/lib/report.ts';
import { PORT } from '../lib/peers.ts';
import { Pair } from './lib/index.ts';

const SAID_MS = 120_000;

describe('a node', () => {
  let pair: Pair | undefined;
  afterEach(async () => {
    await pair?.close();
    pair = undefined;
  });

  for (const [what, seconds] of [
    ['two minutes behind', -120],
    ['a day ahead', 86_400],
  ] as const) {
    it(`${what} says so, and serves when its clock is set right`, async () => {
      pair = await Pair.boot({ second: { clock: seconds } });
      const { first, second } = pair;
      await pair.namespace('meshed', true);
      const client = await pair.pod(first, 'client', 'meshed');
      const server = await pair.pod(second, 'server', 'meshed');
      await second.startServer(server);
      await first.startController();
      for (const node of pair.nodes) {
        await node.admit(first);
        node.startAgent();
        node.startProxy();
      }
      await first.ready();
      const line = await waitFor(
        'the proxy to say that its clock is wrong',
        async () => (await second.log('proxy')).split('\n').find((each) => each.includes('clock skew')),
        { timeoutMs: SAID_MS, intervalMs: 500 },
      );
      const checked = await second.ebbtide(['check', '--output', 'json'], { env: second.controlPlane });
      const findings = JSON.parse(checked.stdout) as { code: string; result: string; seen: string }[];
      const finding = findings.find(({ code }) => code === 'CLOCK_SKEW');
      expect(finding?.result, checked.stdout).not.toBe('ok');
      expect(finding?.seen).toMatch(seconds < 0 ? /behind/ : /ahead/);
      figure(`clock ${what}`, `log: ${(JSON.parse(line) as { msg: string }).msg}; check: ${finding?.seen}`);
      const served = first.background(client, 'until-answered', server.addresses.v4, PORT.whoami, 240);
      await second.guest.must(['date', '-s', `@${Math.round(Date.now() / 1000)}`]);
      const began = performance.now();
      const report = await served.report;
      expect(report.ms, await pair.logs()).not.toBeNull();
      await second.ready();
      figure(`clock ${what}, set right`, `served ${Math.round(performance.now() - began)} ms later`);
      const seen = await first.client(client, 'whoami', server.addresses.v4, PORT.whoami);
      expect(seen).toMatchObject({ peer: client.addresses.v4 });
    });
  }
});
