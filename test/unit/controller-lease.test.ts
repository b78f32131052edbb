/** The election of the replica that writes, against an API that answers, refuses, or says nothing. */
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { afterEach, expect, test } from 'vitest';
import { Election } from '../../src/controller/cluster/lease.ts';
import { type Api, ApiError, type RequestOptions } from '../../src/mesh/api/index.ts';

const TIMES = { durationMs: 1000, deadlineMs: 600, retryMs: 50 };
const log = pino({ enabled: false });
const elections: Election[] = [];
afterEach(() => Promise.all(elections.splice(0).map((election) => election.close())));

/** An API that holds one Lease. */
class LeaseApi {
  lease: { metadata: { name: string; resourceVersion: string }; spec: Record<string, unknown> } | undefined;
  silent = false;
  writes = 0;
  readonly request = async (method: string, _path: string, options: RequestOptions = {}): Promise<unknown> => {
    if (this.silent) {
      await sleep(options.timeoutMs ?? 0);
      throw new ApiError(0, 'Timeout', 'no answer');
    }
    if (method === 'GET') {
      if (this.lease === undefined) throw new ApiError(404, 'NotFound', 'none');
      return structuredClone(this.lease);
    }
    const body = options.body as {
      metadata: { name: string; resourceVersion?: string };
      spec: Record<string, unknown>;
    };
    const version = this.lease?.metadata.resourceVersion;
    if (method === 'POST' ? version !== undefined : body.metadata.resourceVersion !== version) {
      throw new ApiError(409, 'Conflict', 'another was first');
    }
    this.lease = { metadata: { name: 'l', resourceVersion: String(++this.writes) }, spec: body.spec };
    return this.lease;
  };
}

function elect(api: LeaseApi, identity: string): Election {
  const election = new Election({
    api: api as unknown as Api,
    namespace: 'n',
    name: 'l',
    identity,
    log,
    changed() {},
    times: TIMES,
  });
  elections.push(election);
  election.start();
  return election;
}

test('one of many leads, the next takes over when it leaves', async () => {
  const api = new LeaseApi();
  const all = ['a', 'b', 'c', 'd'].map((identity) => elect(api, identity));
  const leading = (): Election[] => all.filter((election) => election.leading);
  await expect.poll(() => leading().length).toBe(1);
  for (let look = 0; look < 20; look++) {
    expect(leading()).toHaveLength(1);
    await sleep(20);
  }
  const [first] = leading();
  await first?.close();
  expect(first?.leading).toBe(false);
  await expect.poll(() => leading().length, { timeout: 500 }).toBe(1);
  expect(api.lease?.spec.leaseTransitions).toBe(1);
});

test('who cannot renew stops before others may begin, also when the API says nothing', async () => {
  const api = new LeaseApi();
  const election = elect(api, 'a');
  await expect.poll(() => election.leading).toBe(true);
  api.silent = true;
  const began = performance.now();
  await expect.poll(() => election.leading, { timeout: 2000, interval: 5 }).toBe(false);
  // From the last renewal, which was up to a retry before.
  expect(performance.now() - began).toBeLessThan(TIMES.durationMs);
  api.silent = false;
  await expect.poll(() => election.leading, { timeout: 2000 }).toBe(true);
});

test('a lease that another one renews is not taken, whatever the clocks say', async () => {
  const api = new LeaseApi();
  const spec = { holderIdentity: 'other', leaseDurationSeconds: 1, renewTime: '2001-01-01T00:00:00.000000Z' };
  api.lease = { metadata: { name: 'l', resourceVersion: '0' }, spec };
  const election = elect(api, 'a');
  for (let renewal = 1; renewal < 20; renewal++) {
    await sleep(100);
    api.lease = { metadata: { name: 'l', resourceVersion: `r${renewal}` }, spec };
    expect(election.leading).toBe(false);
  }
  // Not renewed any more.
  await expect.poll(() => election.leading, { timeout: 3000 }).toBe(true);
});
