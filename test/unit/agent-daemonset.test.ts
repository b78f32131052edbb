/** What the end of an agent means, by what the API says of its DaemonSet. */
import { describe, expect, it } from 'vitest';
import { OwnDaemonSet } from '../../src/agent/daemonset.ts';
import { isWantedOn, type NodeChoice } from '../../src/agent/node-match.ts';
import { type Api, ApiError } from '../../src/mesh/api/index.ts';

const pod = { metadata: { name: 'a', ownerReferences: [{ kind: 'DaemonSet', name: 'node', controller: true }] } };

/** An agent's DaemonSet that was found once, and of which the API then says this. */
async function endingWith(
  answer: object | Error,
  node: object | Error = {},
): Promise<{ keep: boolean; reason: string }> {
  let found = false;
  const api = {
    async request(_: string, path: string): Promise<unknown> {
      if (path.includes('/pods/')) return pod;
      if (path === '/api/v1/nodes/n1') {
        if (node instanceof Error) throw node;
        return node;
      }
      if (!found) return { metadata: { name: 'node' } };
      if (answer instanceof Error) throw answer;
      return answer;
    },
  } as unknown as Api;
  const own = new OwnDaemonSet(api, { name: 'a', namespace: 'mesh' }, 'n1');
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
  it('pods are let go where the DaemonSet does not choose the node any more, and stay where that is not known', async () => {
    const daemonSet = (spec: object): object => ({ metadata: { name: 'node' }, spec: { template: { spec } } });
    const node = { metadata: { name: 'n1', labels: { mesh: 'yes' } } };
    const yes = daemonSet({ nodeSelector: { mesh: 'yes' } });
    expect(await endingWith(yes, node)).toMatchObject({ keep: true });
    const no = daemonSet({ nodeSelector: { mesh: 'no' } });
    expect(await endingWith(no, node)).toMatchObject({
      keep: false,
      reason: expect.stringContaining('choose node n1'),
    });
    const refused = new ApiError(403, 'Forbidden', 'not allowed');
    expect(await endingWith(no, refused)).toMatchObject({ keep: true, reason: expect.stringContaining('not allowed') });
  });
});

describe('the choice of nodes', () => {
  const node = { metadata: { name: 'n1', labels: { zone: 'a', cores: '8' } } };
  const affinity = (...nodeSelectorTerms: object[]): NodeChoice => ({
    affinity: { nodeAffinity: { requiredDuringSchedulingIgnoredDuringExecution: { nodeSelectorTerms } } },
  });
  const one = (key: string, operator: string, ...values: string[]): NodeChoice =>
    affinity({ matchExpressions: [{ key, operator, values }] });
  it.each([
    [{}, true],
    [{ nodeSelector: { zone: 'a' } }, true],
    [{ nodeSelector: { zone: 'a', cores: '4' } }, false],
    [one('zone', 'In', 'a', 'b'), true],
    [one('zone', 'NotIn', 'a'), false],
    [one('gone', 'NotIn', 'a'), true],
    [one('gone', 'Exists'), false],
    [one('gone', 'DoesNotExist'), true],
    [one('cores', 'Gt', '4'), true],
    [one('cores', 'Lt', '4'), false],
    [one('zone', 'Gt', '4'), false],
    [affinity(), false],
    [affinity({}), false],
    [affinity({}, { matchFields: [{ key: 'metadata.name', operator: 'In', values: ['n1'] }] }), true],
    [affinity({ matchFields: [{ key: 'metadata.name', operator: 'NotIn', values: ['n1'] }] }), false],
  ])('by %j: %s', (choice, wanted) => expect(isWantedOn(choice as NodeChoice, node)).toBe(wanted));
});
