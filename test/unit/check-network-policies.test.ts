/** Which NetworkPolicies keep HBONE from pods of the mesh, and what is made of published roots. */

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { judgePolicies, judgeRoots } from '../../src/cli/check/cluster.ts';
import { blockedPods, type NetworkPolicy, selects } from '../../src/cli/check/network-policies.ts';
import { createAuthority } from '../../src/controller/authority.ts';
import { loadRoot } from '../../src/controller/root.ts';
import type { Pod } from '../../src/mesh/kubernetes.ts';

const pod = (name: string, labels: Record<string, string> = {}, namespace = 'shop'): Pod => ({
  metadata: { name, namespace, uid: name, labels },
});
type Spec = NonNullable<NetworkPolicy['spec']>;
const policy = (spec: Spec, name = 'p', namespace = 'shop'): NetworkPolicy => ({ metadata: { name, namespace }, spec });
const FROM_WEB = [{ podSelector: { matchLabels: { app: 'web' } } }];
const what = (...specs: Spec[]): string[] =>
  blockedPods(
    specs.map((spec) => policy(spec)),
    [pod('db', { app: 'db' })],
  ).map((each) => `${each.direction} ${each.what}`);

describe('policies of the network', () => {
  it('block where the ports of a rule lack 15008', () => {
    expect(what({ ingress: [{ ports: [{ port: 5432 }] }] })).toEqual(['ingress all']);
    expect(what({ ingress: [{ from: FROM_WEB, ports: [{ protocol: 'TCP', port: 'postgres' }] }] })).toEqual([
      'ingress all',
    ]);
    expect(what({ policyTypes: ['Egress'], egress: [{ ports: [{ port: 443 }] }] })).toEqual(['egress all']);
    expect(what({ ingress: [{ ports: [{ port: 15_000, endPort: 15_007 }] }] })).toEqual(['ingress all']);
    expect(what({ ingress: [{ ports: [{ protocol: 'UDP', port: 15_008 }, { port: 80 }] }] })).toEqual(['ingress all']);
  });

  it('do not where 15008 is among them, in a range, or all ports are open', () => {
    expect(what({ ingress: [{ ports: [{ port: 5432 }, { port: 15_008 }] }] })).toEqual([]);
    expect(what({ ingress: [{ ports: [{ port: 15_000, endPort: 15_010 }] }] })).toEqual([]);
    expect(what({ ingress: [{ ports: [{ protocol: 'TCP' }] }] })).toEqual([]);
    expect(what({ ingress: [{ from: FROM_WEB }] })).toEqual([]);
    expect(what({ podSelector: { matchLabels: { app: 'other' } }, ingress: [{ ports: [{ port: 1 }] }] })).toEqual([]);
  });

  it('count together: what one lacks another may give, to the same peers or to all', () => {
    const needs: Spec = { ingress: [{ from: FROM_WEB, ports: [{ port: 5432 }] }] };
    expect(what(needs, { ingress: [{ ports: [{ port: 15_008 }] }] })).toEqual([]);
    expect(what(needs, { ingress: [{ from: FROM_WEB, ports: [{ port: 15_008 }] }] })).toEqual([]);
    const others = [{ podSelector: { matchLabels: { app: 'monitor' } } }];
    expect(what(needs, { ingress: [{ from: others, ports: [{ port: 15_008 }] }] })).toEqual(['ingress some']);
  });

  it('that let nothing of pods through at all are left to mean it', () => {
    expect(what({ policyTypes: ['Ingress'] })).toEqual([]);
    expect(what({ ingress: [{ from: [{ ipBlock: { cidr: '10.0.0.0/8' } }], ports: [{ port: 80 }] }] })).toEqual([]);
    expect(what({ policyTypes: ['Egress'], egress: [{ ports: [{ protocol: 'UDP', port: 53 }] }] })).toEqual([]);
  });

  it('are of their namespace and about what they say', () => {
    const rule: Spec = { ingress: [{ ports: [{ port: 80 }] }] };
    expect(blockedPods([policy(rule, 'p', 'elsewhere')], [pod('db')])).toEqual([]);
    expect(blockedPods([policy({ ...rule, policyTypes: ['Egress'] })], [pod('db')])).toEqual([]);
    expect(blockedPods([policy(rule)], [pod('db')])).toEqual([
      { pod: 'shop/db', direction: 'ingress', what: 'all', policies: ['shop/p'] },
    ]);
  });

  it('select as Kubernetes does', () => {
    const expression = (operator: string, values?: string[]): boolean =>
      selects({ matchExpressions: [{ key: 'app', operator, ...(values ? { values } : {}) }] }, { app: 'a' });
    expect([expression('In', ['a']), expression('In', ['b']), expression('NotIn', ['b'])]).toEqual([true, false, true]);
    expect([expression('Exists'), expression('DoesNotExist'), expression('Nonsense')]).toEqual([true, false, false]);
    expect(selects({ matchExpressions: [{ key: 'x', operator: 'NotIn', values: ['b'] }] }, {})).toBe(true);
    expect(selects(undefined, {})).toBe(true);
  });

  it('become one finding', () => {
    expect(judgePolicies([], []).result).toBe('not tried');
    expect(judgePolicies([], [pod('db')]).result).toBe('ok');
    const blocking = policy({ ingress: [{ ports: [{ port: 80 }] }] }, 'web-only');
    expect(judgePolicies([blocking], [pod('db'), pod('web')])).toMatchObject({
      result: 'failed',
      seen: expect.stringMatching(/2 pods without TCP 15008: ingress of shop\/db \(shop\/web-only\)/),
    });
    const partly = policy({
      ingress: [
        { from: FROM_WEB, ports: [{ port: 80 }] },
        { from: [{ namespaceSelector: {} }], ports: [{ port: 15_008 }] },
      ],
    });
    expect(judgePolicies([partly], [pod('db')]).result).toBe('warning');
  });
});

describe('published roots', () => {
  it('are missing, different, or those of the controller', async () => {
    const directories = [0, 1].map(() => mkdtempSync(join(tmpdir(), 'check-root-')));
    try {
      const [one = '', other = ''] = await Promise.all(
        directories.map(async (directory) => createAuthority(await loadRoot(directory)).bundle),
      );
      const judge = (maps: Record<string, string | undefined>, controller?: string): string => {
        const { result, seen } = judgeRoots(['a', 'b'], new Map(Object.entries(maps)), controller);
        return `${result} ${seen}`;
      };
      expect(judge({ a: one })).toMatch(/^failed .*missing in b/);
      expect(judge({ a: one, b: other })).toMatch(/^failed roots in b differ/);
      expect(judge({ a: one, b: 'nonsense' })).toMatch(/^failed/);
      expect(judge({ a: one, b: one })).toMatch(/^ok .*not compared/);
      expect(judge({ a: one, b: one }, other)).toMatch(/^failed .*but others/);
      expect(judge({ a: `${one}${other}`, b: `${other}${one}` }, `${one}${other}`)).toMatch(/^ok 2 roots/);
    } finally {
      for (const directory of directories) rmSync(directory, { recursive: true });
    }
  });
});
