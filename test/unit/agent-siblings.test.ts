import { expect, it } from 'vitest';
import { misplaced } from '../../src/agent/proxy-place.ts';
import { isSibling } from '../../src/agent/siblings.ts';
import type { Pod } from '../../src/mesh/kubernetes.ts';

const owned = (name: string, owner: string | undefined, namespace = 'mesh', kind = 'DaemonSet'): Pod => ({
  metadata: {
    name,
    namespace,
    uid: name,
    ...(owner === undefined ? {} : { ownerReferences: [{ kind, name: owner, controller: true }] }),
  },
});
const pods = [
  owned('self', 'node'),
  owned('before', 'node'),
  owned('other', 'ztunnel'),
  owned('alone', undefined),
  owned('thief', 'node', 'team'),
  owned('set', 'node', 'mesh', 'ReplicaSet'),
];
const settings = { ownPod: { name: 'self', namespace: 'mesh' }, proxyNetns: 'own' } as const;

it.each([
  ['mesh/before', true],
  ['mesh/other', false],
  ['mesh/alone', false],
  ['mesh/set', false],
  ['team/thief', false],
  ['mesh/unknown', false],
])('a proxy in %s: %s', (name, allowed) => expect(isSibling(name, pods, settings)).toBe(allowed));

it('where any proxy may be, every pod of the agent’s namespace may hold one, and no other', () => {
  const any = { ...settings, proxyNetns: 'any' } as const;
  expect(isSibling('mesh/other', pods, any)).toBe(true);
  expect(isSibling('team/thief', pods, any)).toBe(false);
  expect(isSibling('mesh/before', pods, { ownPod: undefined, proxyNetns: 'any' })).toBe(false);
});

it('an agent that is no pod of a DaemonSet has no siblings', () => {
  expect(isSibling('mesh/alone', [owned('self', undefined), owned('alone', undefined)], settings)).toBe(false);
});

it('a process in a sibling’s network may be a proxy; in another pod’s it may not', () => {
  const places = {
    allowed: 'own',
    own: 1n,
    podOf: (cookie: bigint) => (cookie === 2n ? 'mesh/before' : 'team/thief'),
    isProxyPod: (pod: string) => isSibling(pod, pods, settings),
  } as const;
  expect(misplaced(2n, places)).toBeUndefined();
  expect(misplaced(3n, places)).toMatch(/team\/thief/);
});
