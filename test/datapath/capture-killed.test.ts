/** An agent killed at any moment of enrolment and release: the next one finds its way, and nothing is left behind. */

import { type ChildProcess, spawn } from 'node:child_process';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { patient } from '../../src/lab/wait.ts';
import { bpfObjects, CaptureLab, cgroupRoot, OUTSIDE, run } from './capture/lab.ts';

const ADDON = new URL('../../native/build/Release/capture.node', import.meta.url).pathname;
const ROUNDS = 12;

describe('an agent killed at any moment', () => {
  let lab: CaptureLab;
  let child: ChildProcess | undefined;

  beforeEach(() => {
    lab = new CaptureLab();
  });
  afterEach(async () => {
    child?.kill('SIGKILL');
    await lab?.remove();
  });

  function cookies(map: string): number {
    const script = `bpftool map dump pinned ${lab.pinDirectory('agent')}/v2/maps/${map} | grep -c '"key":'; true`;
    return Number(run('sh', '-c', script));
  }

  it('is followed by one that takes away what belongs to no pod', () => {
    const maps = `${lab.pinDirectory('agent')}/v2/maps`;
    lab.open().close({ remove: false });
    const cookie = ['hex', 'ff', 'ff', 'ff', 'ff', 'ff', '0', '0', '0'];
    const value = Array<string>(72).fill('0');
    const address = [...Array<string>(10).fill('0'), 'ff', 'ff', 'a', '0', '0', '1'];
    run('bpftool', 'map', 'update', 'pinned', `${maps}/ebb_stats`, 'key', ...cookie, 'value', ...value);
    run(
      ...['bpftool', 'map', 'update', 'pinned', `${maps}/ebb_addresses`],
      ...['key', ...cookie, ...address, 'value', '1', '0', '0', '0'],
    );
    expect([cookies('ebb_stats'), cookies('ebb_addresses')]).toEqual([2, 1]);
    lab.open();
    expect([cookies('ebb_stats'), cookies('ebb_addresses')]).toEqual([1, 0]);
  });

  it('is followed by one that captures and releases all the same', { timeout: patient(120_000) }, async () => {
    const before = bpfObjects();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const doomed = lab.addPod('b', '10.231.0.3', 'fd31::3');
    const first = lab.open();
    first.prepare(pod.pod);
    const proxy = await lab.startProxy(first, pod, 1);
    first.close({ remove: false });
    const options = { cgroup: cgroupRoot(), pinDirectory: lab.pinDirectory('agent') };
    const script = (classicGuard: boolean) => `
      const { Capture, openNetns } = require(${JSON.stringify(ADDON)});
      const pods = [[${JSON.stringify(pod.path)}, ${JSON.stringify(pod.pod)}], [${JSON.stringify(doomed.path)}, ${JSON.stringify(doomed.pod)}]]
        .map(([path, pod]) => ({ ...pod, netnsFd: openNetns(path) }));
      process.stdout.write('begun');
      const capture = new Capture(${JSON.stringify({ ...options, classicGuard })});
      for (;;) {
        for (const pod of pods) capture.activate(pod);
        for (const pod of pods) capture.release(pod.uid);
      }`;
    for (let round = 0; round < ROUNDS; round++) {
      const killed = spawn(process.execPath, ['-e', script(round % 2 === 1)], { stdio: ['ignore', 'pipe', 'inherit'] });
      child = killed;
      const gone = new Promise((resolve) => killed.once('exit', resolve));
      await new Promise((resolve) => killed.stdout?.once('data', resolve));
      await new Promise((resolve) => setTimeout(resolve, 20 + 23 * round + 9 * Math.random()));
      killed.kill('SIGKILL');
      await gone;

      const next = lab.open();
      for (const uid of next.adopted().map((each) => each.uid)) expect(['uid-a', 'uid-b']).toContain(uid);
      next.release('uid-b');
      next.activate(pod.pod);
      expect(next.status()).toMatchObject([{ uid: 'uid-a', outbound: true, inbound: true, guard: 'attached' }]);
      next.removeStrays();
      expect(lab.guardFilters('b')).toBe('');
      expect(pod.connect(OUTSIDE.ip4, 80).answer).toBe(`proxy outbound ${OUTSIDE.ip4}:80`);
      expect(lab.runOutside('connect', '10.231.0.2', '80').answer).toMatch(/^proxy plaintext /);
      expect(cookies('ebb_pods')).toBe(1);
      expect(cookies('ebb_addresses')).toBe(2);
      expect(cookies('ebb_stats')).toBe(2);
      next.close({ remove: false });
    }
    await proxy.stop();
    lab.open().close({ remove: true });
    await expect
      .poll(() => bpfObjects().prog?.filter((id) => !before.prog?.includes(id)), { timeout: patient(10_000) })
      .toEqual([]);
    expect(bpfObjects().link?.filter((id) => !before.link?.includes(id))).toEqual([]);
  });
});
