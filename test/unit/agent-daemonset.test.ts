/** What the end of an agent means, by what the API says of its DaemonSet. */
import { describe, expect, it } from 'vitest';
import { OwnDaemonSet } from '../../src/agent/daemonset.ts';
import { type Api, ApiError } from '../../src/mesh/api/index.ts';

const pod = { metadata: { name: 'a', ownerReferences: [{ kind: 'DaemonSet', name: 'node', controller: true }] } };

/** An agent's DaemonSet that was found once, and of which the API then says this. */
async function endingWith(answer: object | Error): Promise<{ keep: boolean; reason: string }> {
  let found = false;
  const api = {
    async request(_: string, path: string): Promise<unknown> {
      if (path.includes('/pods/')) return pod;
      if (!found) return { metadata: { name: 'node' } };
      if (answer instanceof Error) throw answer;
      return answer;
    },
  } as unknown as Api;
  const own = new OwnDaemonSet(api, { name: 'a', namespace: 'mesh' });
  await own.find();
  found = true;
  return own.ending();
}

describe('at the end of an agent', () => {
  it('pods stay captured while its DaemonSet stays', async () => {
    expect(await endingWith({ metadata: { name: 'node' } })).toMatchObject({ keep: true });
  });
  it('pods are let go where its DaemonSet is being deleted, or is gone', async () => {
    const deleted = { metadata: { name: 'node', deletionTimestamp: '2026-01-01T00:00:00Z' } };
    expect(await endingWith(deleted)).toMatchObject({ keep: false });
    expect(await endingWith(new ApiError(404, 'NotFound', 'no'))).toMatchObject({ keep: false });
  });
  it.each([401, 403])(
    'pods stay captured where it may not ask (%i): an upgrade may have moved its rights',
    async (code) => {
      const ending = await endingWith(new ApiError(code, 'Refused', 'not allowed'));
      expect(ending).toMatchObject({ keep: true, reason: expect.stringContaining('not allowed') });
    },
  );
  it('pods stay captured where the API does not answer', async () => {
    expect(await endingWith(new ApiError(0, 'Unreachable', 'no route'))).toMatchObject({ keep: true });
  });
});
