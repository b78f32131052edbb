/** A node whose clock is wrong, or is set while it runs: it fails closed, says clock skew, and mends itself when it is set right. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Finding } from '../../src/cli/check/finding.ts';
import { EBBTIDE, type Lab, LabProcess, type Pod, placed, run, waitFor } from '../../src/lab/index.ts';
import { CONTROL_ADDRESS } from '../../src/lab/network.ts';
import { CONTROLLER_PORT } from '../../src/mesh/ports.ts';
import { labWith, pairLab } from '../lib/mesh-lab.ts';
import { Background, clientArgv, PORT } from '../lib/peers.ts';

/** Debian's place of it, where .ci/setup installs it. It shifts what one process takes for the time. */
const FAKETIME = ['x86_64', 'aarch64']
  .map((machine) => `/usr/lib/${machine}-linux-gnu/faketime/libfaketime.so.1`)
  .find((path) => existsSync(path));

describe('a wrong clock', () => {
  let made: { near: Pod; server: Pod; lab: Lab };
  let offset: string;
  beforeAll(async () => {
    if (FAKETIME === undefined) throw new Error('no libfaketime: apt-get install libfaketime (bash .ci/setup does)');
    made = await labWith(pairLab);
    offset = join(made.lab.ground.directory, 'offset');
  });
  afterAll(() => made?.lab.close());

  /** As libfaketime takes it: seconds. */
  const set = (seconds: number, file = offset): void => writeFileSync(file, `${seconds < 0 ? '' : '+'}${seconds}s\n`);
  const env = (file = offset): NodeJS.ProcessEnv => ({
    LD_PRELOAD: FAKETIME,
    FAKETIME_TIMESTAMP_FILE: file,
    FAKETIME_CACHE_DURATION: '1',
    FAKETIME_DONT_FAKE_MONOTONIC: '1',
  });
  const log = (): string => readFileSync(made.lab.node(2).log('proxy'), 'utf8');
  const said = (from: number, text: RegExp): Promise<unknown> =>
    waitFor(`the proxy to log ${text}`, async () => text.test(log().slice(from)), {
      timeoutMs: 30_000,
      hint: () => log().slice(from).slice(-3000),
    });
  const reach = async (): Promise<number> => {
    const argv = clientArgv('whoami', made.server.addresses.v4, PORT.whoami);
    return (await made.near.run(argv, { timeoutMs: 5000 })).code;
  };
  const reaches = async (): Promise<number> => {
    const started = performance.now();
    await waitFor('a connection to succeed', async () => (await reach()) === 0, { timeoutMs: 60_000 });
    return Math.round(performance.now() - started);
  };
  async function restart(seconds: number): Promise<number> {
    const node = made.lab.node(2);
    await node.proxy?.stop('SIGKILL');
    set(seconds);
    const from = log().length;
    await node.startProxy(0, env());
    return from;
  }
  async function check(): Promise<{ readonly code: number; readonly of: (code: string) => Finding | undefined }> {
    const argv = [process.execPath, EBBTIDE, 'check', '--output', 'json'];
    const controller = {
      XDS_ADDRESS: `https://${CONTROL_ADDRESS}:${CONTROLLER_PORT}`,
      XDS_ROOT_CA: join(made.lab.ground.directory, 'data/root-cert.pem'),
    };
    const { code, stdout } = await run(placed(made.lab.node(2).place, argv), { env: { ...env(), ...controller } });
    const findings = JSON.parse(stdout) as Finding[];
    return { code, of: (wanted) => findings.find((finding) => finding.code === wanted) };
  }

  for (const [seconds, text] of [
    [86_400, '24 h ahead'],
    [-150, '150 s behind'],
  ] as const) {
    it(`${text}: is called clock skew in the log and by the check; nothing passes; it works once it is set right`, async () => {
      const from = await restart(seconds);
      await said(
        from,
        new RegExp(`"event":"clock_skew".*clock skew: this machine is ${text}, by the clock of the controller`),
      );
      expect(await reach()).not.toBe(0);
      const checked = await check();
      expect(checked.code).toBe(1);
      expect(checked.of('CLOCK_SKEW')).toMatchObject({
        result: 'failed',
        seen: expect.stringContaining(text.split(' ')[0] ?? ''),
      });
      expect(checked.of('CONTROLLER')).toMatchObject({
        result: 'failed',
        seen: expect.stringContaining('by the clock here'),
      });
      // Asked at growing intervals, not all the time.
      expect(
        log()
          .slice(from)
          .match(/"event":"xds_disconnected"/g)?.length,
      ).toBeLessThan(25);
      set(0);
      const took = await reaches();
      process.stdout.write(`figure: clock ${text}: ${took} ms from set right to the first connection\n`);
      await said(from, /"event":"clock_skew_gone"/);
      expect((await check()).of('CLOCK_SKEW')).toMatchObject({ result: 'ok' });
    });
  }

  it('set forward by a day and back while it runs: what is open goes on, it is said, and new connections come back', async () => {
    const from = await restart(0);
    await reaches();
    const open = await Background.start(made.near, 'hold', made.server.addresses.v4, PORT.watch, 20);
    await open.said('open');
    set(86_400);
    await said(from, /"event":"clock_jumped".*set forward by 24 h/);
    await said(from, /"event":"certificate_out_of_time".*has ended; it stays in use/);
    await said(from, /"event":"clock_skew".*24 h ahead/);
    set(0);
    await said(from, /"event":"clock_jumped".*set back by 24 h/);
    await reaches();
    expect(await open.result()).toMatchObject({ outcome: 'still open' });
  });

  it('of the controller: what it signed a day ahead is replaced once its clock is set right', async () => {
    const { controller, ground } = made.lab;
    await controller?.stop('SIGKILL');
    // The proxy has the clock of the tests before.
    const own = `${offset}-controller`;
    set(86_400, own);
    const data = join(ground.directory, 'data');
    const root = readFileSync(join(data, 'root-cert.pem'), 'utf8');
    const argv = [process.execPath, EBBTIDE, 'controller', '--manifests', join(ground.directory, 'manifests')];
    argv.push('--data', data, '--listen', `${CONTROL_ADDRESS}:${CONTROLLER_PORT}`);
    const place = { netns: ground.netnsPath('control'), cgroup: ground.subgroup('control') };
    const file = join(ground.directory, 'logs/controller-ahead.log');
    const from = log().length;
    const ahead = await LabProcess.start('controller ahead', place, argv, { log: file, env: env(own) });
    try {
      // Both say it: nobody knows whose clock is the wrong one.
      await said(from, /clock skew: this machine is 24 h behind, by the clock of the controller/);
      set(0, own);
      await waitFor('the controller to notice', async () => /"event":"clock_jumped"/.test(readFileSync(file, 'utf8')));
      await said(from, /"event":"clock_skew_gone"/);
      await waitFor('the proxy to be connected', async () => /xds_connected/.test(log().slice(from)), {
        timeoutMs: 30_000,
      });
      // The root stayed: it was not made by the wrong clock.
      expect(readFileSync(join(data, 'root-cert.pem'), 'utf8')).toBe(root);
      await reaches();
    } finally {
      await ahead.stop();
    }
  });
});
