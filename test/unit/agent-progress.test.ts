import { pino } from 'pino';
import { beforeEach, describe, expect, it, vi } from 'vitest';
import { podsPending } from '../../src/agent/active.ts';
import { PodEvents } from '../../src/agent/pod-events.ts';
import type { PodOutlook } from '../../src/agent/pods.ts';
import { type PodProgress, Progress } from '../../src/agent/progress.ts';
import { Redirections, wantedRedirection } from '../../src/agent/redirections.ts';
import { type Api, ApiError } from '../../src/mesh/api/index.ts';
import { FakeApi } from '../lib/fake-api.ts';

const log = pino({ level: 'silent' });
const outlook = (more: Partial<PodOutlook> = {}): PodOutlook => ({
  uid: 'u',
  namespace: 'team',
  name: 'p',
  wanted: true,
  state: 'waiting',
  served: false,
  reason: 'why',
  failedTries: 1,
  redirection: undefined,
  ...more,
});
const served = { state: 'captured', served: true, reason: '' } as const;
const progress = (more: Partial<PodProgress> = {}): PodProgress => ({
  ...outlook(),
  good: false,
  badForMs: 0,
  ...more,
});

let fake: FakeApi;
let now: number;
beforeEach(() => {
  fake = new FakeApi();
  now = 1000;
});
const turn = () => new Promise((resolve) => setImmediate(resolve));

describe('progress', () => {
  it('counts from when a pod is first wanted to when it is first served, once', () => {
    const durations: number[] = [];
    const all = new Progress(
      (ms) => durations.push(ms),
      () => now,
    );
    expect(all.update([outlook()])).toMatchObject([{ good: false, badForMs: 0 }]);
    now += 300;
    expect(all.update([outlook()])).toMatchObject([{ good: false, badForMs: 300 }]);
    all.update([outlook(served)]);
    expect(durations).toEqual([300]);
    now += 50;
    all.update([outlook({ ...served, served: false })]);
    now += 50;
    expect(all.update([outlook(served)])).toMatchObject([{ good: true, badForMs: 0 }]);
    expect(durations).toEqual([300]);
  });

  it('does not count pods that were captured before, counts those that are labelled while they run', () => {
    const durations: number[] = [];
    const all = new Progress(
      (ms) => durations.push(ms),
      () => now,
    );
    all.update([outlook({ state: 'captured' }), outlook({ uid: 'v', wanted: false, state: 'not enrolled' })]);
    now += 100;
    all.update([outlook(served), outlook({ uid: 'v' })]);
    expect(durations).toEqual([]);
    now += 70;
    all.update([outlook(served), outlook({ uid: 'v', ...served })]);
    expect(durations).toEqual([70]);
  });
});

it('an agent waits for pods that are not served yet, but for none that has failed for long', () => {
  const pods = [progress({ badForMs: 29 }), progress({ uid: 'w', badForMs: 30 }), progress({ good: true })];
  expect(podsPending([...pods, progress({ wanted: false })], 30)).toEqual(['pod team/p (waiting: why)']);
});

describe('the redirection annotation', () => {
  it.each([
    ['served', { ...served, good: true }, undefined, 'enabled'],
    ['new and not served yet', {}, undefined, undefined],
    ['not served for long', { badForMs: 2000 }, undefined, 'pending'],
    ['not served, said to be', {}, 'enabled', 'pending'],
    ['captured, its proxy away', { state: 'captured', badForMs: 9000 }, 'enabled', 'enabled'],
    ['captured, never served', { state: 'captured', badForMs: 9000 }, undefined, 'pending'],
    ['leaving', { state: 'leaving' }, 'enabled', undefined],
    ['not wanted', { wanted: false, state: 'not enrolled' }, 'enabled', undefined],
    ['ending, without addresses', { wanted: false, state: 'captured' }, 'enabled', 'enabled'],
  ] as const)('of a pod that is %s', (_, more, before, after) => {
    expect(wantedRedirection(progress(more), before)).toBe(after);
  });

  it('is written once by uid, believed until it is seen, and written again when it is not seen', async () => {
    const redirections = new Redirections(fake.api, log, () => now);
    const pod = progress({ ...served, good: true });
    redirections.update([pod]);
    await turn();
    expect(fake.asked).toEqual([
      {
        method: 'PATCH',
        path: '/api/v1/namespaces/team/pods/p/status',
        body: { metadata: { uid: 'u', annotations: { 'ambient.istio.io/redirection': 'enabled' } } },
      },
    ]);
    redirections.update([pod]);
    await turn();
    expect(fake.asked).toHaveLength(1);
    now += 5001;
    redirections.update([pod]);
    await turn();
    expect(fake.asked).toHaveLength(2);
    redirections.update([{ ...pod, redirection: 'enabled' }]);
    redirections.update([{ ...pod, redirection: undefined }]);
    await turn();
    expect(fake.asked).toHaveLength(2);
    expect(redirections.settled).toBe(true);
  });

  it('is tried again later and later, without end; a pod that is gone is no failure', async () => {
    const redirections = new Redirections(fake.api, log, () => now);
    fake.failure = new ApiError(500, 'InternalError', 'no');
    const pod = progress({ ...served, good: true });
    for (let n = 0; n < 5; n++) {
      redirections.update([pod]);
      await turn();
      redirections.update([pod]);
      now += 40_000;
    }
    expect(fake.asked).toHaveLength(5);
    expect(redirections.counters).toEqual({ written: 0, failed: 5 });
    fake.failure = new ApiError(404, 'NotFound', 'gone');
    redirections.update([pod]);
    await turn();
    expect(redirections.counters.failed).toBe(5);
  });

  it('is written for so many pods at once only', async () => {
    const release: (() => void)[] = [];
    const api = { request: () => new Promise<void>((resolve) => release.push(resolve)) } as unknown as Api;
    const redirections = new Redirections(api, log, () => now);
    redirections.update(Array.from({ length: 20 }, (_, n) => progress({ uid: `u${n}`, ...served, good: true })));
    expect(release).toHaveLength(8);
    for (const each of release.splice(0)) each();
    await turn();
    expect(release).toHaveLength(8);
  });
});

describe('Events', () => {
  const bad = (more: Partial<PodProgress> = {}) => progress({ badForMs: 3000, ...more });
  const bodies = () => fake.asked.splice(0).map(({ method, body }) => ({ method, ...(body as object) }));

  it('are made after a while, counted up more and more seldom, renewed for another reason, and closed', async () => {
    const events = new PodEvents(fake.api, 'n1', log, () => now);
    events.update([progress({ badForMs: 2999 })]);
    expect(fake.asked).toEqual([]);
    events.update([bad()]);
    await turn();
    expect(bodies()).toMatchObject([
      {
        method: 'POST',
        type: 'Warning',
        reason: 'EbbtideEnrolmentFailed',
        count: 1,
        involvedObject: { uid: 'u', name: 'p' },
        message: expect.stringMatching(/why/),
      },
    ]);
    const counts: unknown[] = [];
    for (let second = 0; second < 200; second++) {
      now += 1000;
      events.update([bad()]);
      await turn();
      counts.push(...bodies().map((body) => [second + 1, (body as unknown as { count: number }).count]));
    }
    expect(counts).toEqual([
      [15, 2],
      [45, 3],
      [105, 4],
    ]);
    now += 600_000;
    events.update([bad({ reason: 'another' })]);
    await turn();
    expect(bodies()).toMatchObject([{ method: 'POST', count: 1, message: expect.stringMatching(/another/) }]);
    events.update([progress({ ...served, good: true })]);
    await turn();
    expect(bodies()).toMatchObject([{ method: 'POST', type: 'Normal', reason: 'EbbtideEnrolled' }]);
    events.update([progress({ ...served, good: true })]);
    await turn();
    expect(fake.asked).toEqual([]);
  });

  it('of a node are so many at once, then one every five seconds', async () => {
    const events = new PodEvents(fake.api, 'n1', log, () => now);
    const many = Array.from({ length: 100 }, (_, n) => bad({ uid: `u${n}` }));
    events.update(many);
    await turn();
    expect(bodies()).toHaveLength(25);
    now += 10_000;
    events.update(many);
    await turn();
    expect(bodies()).toHaveLength(2);
    expect(events.counters.held).toBeGreaterThan(70);
  });

  it('that cannot be written are told once, and do no harm', async () => {
    const warn = vi.fn();
    const events = new PodEvents(fake.api, 'n1', { warn } as unknown as typeof log, () => now);
    fake.failure = new ApiError(403, 'Forbidden', 'not allowed');
    events.update([bad(), bad({ uid: 'v' })]);
    await turn();
    expect(warn).toHaveBeenCalledTimes(1);
    expect(events.counters.failed).toBe(2);
  });
});
