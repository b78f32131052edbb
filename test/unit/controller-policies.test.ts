/** AuthorizationPolicy and PeerAuthentication to L4 policy, as truth tables. */
import { describe, expect, test } from 'vitest';
import {
  buildAuthorizationPolicies,
  convertAuthorizationPolicy,
  policiesOf,
} from '../../src/controller/authorization-policies.ts';
import type { AuthorizationPolicy, PeerAuthentication, Pod } from '../../src/controller/objects.ts';
import { buildPeerAuthentications, STATIC_STRICT_KEY } from '../../src/controller/peer-authentications.ts';
import { istio } from '../../src/mesh/proto/generated.js';

type Spec = NonNullable<AuthorizationPolicy['spec']>;
type Rules = NonNullable<Spec['rules']>;
const { Action, Scope } = istio.security;

const policy = (spec: unknown, namespace = 'shop', annotations = {}): AuthorizationPolicy => ({
  metadata: { name: 'p', namespace, annotations },
  spec: spec as Spec,
});
const convert = (spec: unknown, namespace?: string) => convertAuthorizationPolicy(policy(spec, namespace));
const rulesOf = (spec: unknown) => convert(spec).policy?.authorization.rules;

/** A caller as the proxy sees it. */
interface Caller {
  readonly identity?: { readonly namespace: string; readonly serviceAccount: string };
  readonly ip: string;
  readonly port: number;
}

/** What a proxy decides of one policy: the semantics of the protocol, written down once more for the tests. */
function matches(authorization: istio.security.Authorization.$Properties, caller: Caller): boolean {
  const principal = caller.identity
    ? `cluster.local/ns/${caller.identity.namespace}/sa/${caller.identity.serviceAccount}`
    : undefined;
  const string = (value: string | undefined) => (m: istio.security.StringMatch.$Properties) => {
    if (value === undefined) return false;
    if (m.presence) return value !== '';
    if (typeof m.exact === 'string') return value === m.exact;
    if (typeof m.prefix === 'string') return value.startsWith(m.prefix);
    return value.endsWith(m.suffix ?? '');
  };
  const ip = (a: istio.security.Address.$Properties) => {
    const own = caller.ip.split('.').map(Number);
    const bytes = [...(a.address ?? [])];
    if (bytes.length !== 4) return false;
    const bits = (list: number[]) => list.map((byte) => byte.toString(2).padStart(8, '0')).join('');
    return bits(own).slice(0, a.length ?? 0) === bits(bytes).slice(0, a.length ?? 0);
  };
  const account = (s: istio.security.ServiceAccountMatch.$Properties) =>
    s.namespace === caller.identity?.namespace && s.serviceAccount === caller.identity?.serviceAccount;
  const attribute = <T>(yes: T[] | null | undefined, no: T[] | null | undefined, predicate: (value: T) => boolean) =>
    ((yes ?? []).length === 0 || (yes ?? []).some(predicate)) && !(no ?? []).some(predicate);
  const one = (m: istio.security.Match.$Properties) =>
    Object.values(m).some((list) => Array.isArray(list) && list.length > 0) &&
    attribute(m.principals, m.notPrincipals, string(principal)) &&
    attribute(m.namespaces, m.notNamespaces, string(caller.identity?.namespace ?? '')) &&
    attribute(m.serviceAccounts, m.notServiceAccounts, account) &&
    attribute(m.sourceIps, m.notSourceIps, ip) &&
    attribute(m.destinationPorts, m.notDestinationPorts, (port) => port === caller.port);
  return (authorization.rules ?? []).some((rule) =>
    (rule.clauses ?? []).every((clause) => (clause.matches ?? []).length === 0 || (clause.matches ?? []).some(one)),
  );
}

const web = { namespace: 'shop', serviceAccount: 'web' };
const evil = { namespace: 'evil', serviceAccount: 'web' };
const from = (identity: Caller['identity'], port = 80, ip = '10.0.0.1'): Caller =>
  identity === undefined ? { ip, port } : { identity, ip, port };

describe('AuthorizationPolicy', () => {
  test('scopes', () => {
    expect(convert({}).policy?.authorization.scope).toBe(Scope.NAMESPACE);
    expect(convert({}, 'istio-system').policy?.authorization.scope).toBe(Scope.GLOBAL);
    const selected = convert({ selector: { matchLabels: { app: 'db' } } }).policy;
    expect(selected?.authorization.scope).toBe(Scope.WORKLOAD_SELECTOR);
    expect(selected?.labels).toEqual({ app: 'db' });
    expect(convert({ selector: {} }).policy?.authorization.scope).toBe(Scope.NAMESPACE);
    expect(convert({ targetRefs: [{ kind: 'Gateway', name: 'waypoint' }] }).policy).toBeUndefined();
  });

  test('selecting policies are listed by the pods of their namespace, those of the root namespace by all', () => {
    const { policies } = buildAuthorizationPolicies([
      policy({ selector: { matchLabels: { app: 'db' } } }),
      policy({ selector: { matchLabels: { app: 'db' } } }, 'istio-system'),
      policy({ selector: { matchLabels: { app: 'db', tier: 'x' } } }, 'other'),
      policy({}),
    ]);
    const groups = Map.groupBy(policies, ({ namespace }) => namespace);
    const pod = (namespace: string, labels: Record<string, string>): Pod => ({
      metadata: { name: 'a', uid: 'a', namespace, labels },
    });
    expect(policiesOf(pod('shop', { app: 'db' }), groups)).toEqual(['shop/p', 'istio-system/p']);
    expect(policiesOf(pod('shop', { app: 'web' }), groups)).toEqual([]);
    expect(policiesOf(pod('other', { app: 'db' }), groups)).toEqual(['istio-system/p']);
    expect(policiesOf(pod('other', { app: 'db', tier: 'x' }), groups)).toEqual(['other/p', 'istio-system/p']);
    expect(policiesOf(pod('istio-system', { app: 'db' }), groups)).toEqual(['istio-system/p']);
  });

  test('no rules: ALLOW that never matches', () => {
    expect(convert({}).policy?.authorization).toMatchObject({ action: Action.ALLOW, rules: [] });
    expect(convert({ action: 'DENY', rules: [{}] }).policy?.authorization.rules).toEqual([{ clauses: [] }]);
  });

  test.each([
    ['AUDIT', undefined],
    ['CUSTOM', undefined],
  ])('action %s is left out and reported', (action, expected) => {
    const { policy: converted, problems } = convert({ action, rules: [{}] });
    expect(converted).toBe(expected);
    expect(problems).toHaveLength(1);
  });

  test('an unknown action refuses, a dry run does nothing; both are reported', () => {
    const { policy: converted, problems } = convert({ action: 'deny', rules: [{}] });
    expect(converted?.authorization).toMatchObject({ action: Action.ALLOW, rules: [] });
    expect(problems[0]).toMatch(/refuses everything/);
    const dry = convertAuthorizationPolicy(policy({}, 'shop', { 'istio.io/dry-run': 'true' }));
    expect([dry.policy, dry.problems.length]).toEqual([undefined, 1]);
  });

  test('an unknown selector refuses its whole scope', () => {
    const { policy: converted, problems } = convert({
      selector: { matchLabels: { app: 'db' }, matchExpressions: [] },
      rules: [{}],
    });
    expect(converted?.authorization).toMatchObject({ scope: Scope.NAMESPACE, action: Action.ALLOW, rules: [] });
    expect(problems).toHaveLength(1);
  });

  test('strings: presence, suffix, prefix, exact', () => {
    const rules = rulesOf({
      rules: [{ from: [{ source: { principals: ['*', '*/sa/web', 'cluster.local/*', 'a/b'] } }] }],
    });
    expect(rules?.[0]?.clauses?.[0]?.matches?.[0]?.principals).toEqual([
      { presence: {} },
      { suffix: '/sa/web' },
      { prefix: 'cluster.local/' },
      { exact: 'a/b' },
    ]);
  });

  test('all attributes go where they belong', () => {
    const rules = rulesOf({
      rules: [
        {
          from: [
            {
              source: {
                namespaces: ['a'],
                notNamespaces: ['b'],
                notPrincipals: ['c'],
                serviceAccounts: ['web', 'x/y'],
                notServiceAccounts: ['z'],
                ipBlocks: ['10.1.2.3/8', '::1'],
                notIpBlocks: ['10.0.0.1'],
              },
            },
            { source: { namespaces: ['d'] } },
          ],
          to: [{ operation: { ports: ['80', '443'], notPorts: ['22'] } }],
          when: [
            { key: 'destination.ip', values: ['192.0.2.0/24'] },
            { key: 'source.namespace', notValues: ['e'] },
            { key: 'destination.port', values: ['80'] },
            { key: 'source.principal', values: ['*'] },
            { key: 'source.ip', notValues: ['1.2.3.4'] },
          ],
        },
      ],
    });
    const bytes = (...list: number[]) => Uint8Array.from(list);
    const clauses = rules?.[0]?.clauses ?? [];
    expect(clauses.map(({ matches: list }) => list)).toEqual([
      [
        {
          namespaces: [{ exact: 'a' }],
          notNamespaces: [{ exact: 'b' }],
          notPrincipals: [{ exact: 'c' }],
          serviceAccounts: [
            { namespace: 'shop', serviceAccount: 'web' },
            { namespace: 'x', serviceAccount: 'y' },
          ],
          notServiceAccounts: [{ namespace: 'shop', serviceAccount: 'z' }],
          sourceIps: [
            { address: bytes(10, 0, 0, 0), length: 8 },
            { address: bytes(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1), length: 128 },
          ],
          notSourceIps: [{ address: bytes(10, 0, 0, 1), length: 32 }],
        },
        { namespaces: [{ exact: 'd' }] },
      ],
      [{ destinationPorts: [80, 443], notDestinationPorts: [22] }],
      [{ destinationIps: [{ address: bytes(192, 0, 2, 0), length: 24 }] }],
      [{ notNamespaces: [{ exact: 'e' }] }],
      [{ destinationPorts: [80] }],
      [{ principals: [{ presence: {} }] }],
      [{ notSourceIps: [{ address: bytes(1, 2, 3, 4), length: 32 }] }],
    ]);
  });

  const sourceWeb = { source: { namespaces: ['shop'] } };
  /** Rules, then whether DENY and ALLOW of them match: shop on 80, shop on 443, evil on 80, plaintext on 80. */
  const table: readonly [string, unknown[], string, string][] = [
    ['L4 only', [{ from: [sourceWeb] }], 'yyn.', 'yyn.'],
    [
      'L7 operation beside L4 source',
      [{ from: [sourceWeb], to: [{ operation: { methods: ['GET'] } }] }],
      'yynn',
      'nnnn',
    ],
    ['L7 beside a port', [{ to: [{ operation: { ports: ['80'], paths: ['/x'] } }] }], 'ynyy', 'nnnn'],
    [
      'L7 alternative to a port',
      [{ to: [{ operation: { ports: ['80'] } }, { operation: { hosts: ['a'] } }] }],
      'yyyy',
      'nnnn',
    ],
    ['only L7', [{ to: [{ operation: { methods: ['GET'] } }] }], 'yyyy', 'nnnn'],
    ['L7 source', [{ from: [{ source: { requestPrincipals: ['*'] } }] }], 'yyyy', 'nnnn'],
    ['L7 when', [{ from: [sourceWeb], when: [{ key: 'request.headers[x]', values: ['1'] }] }], 'yynn', 'nnnn'],
    ['bad port among good ones', [{ to: [{ operation: { ports: ['80', '8o'] } }] }], 'yyyy', 'nnnn'],
    ['port 0', [{ to: [{ operation: { ports: ['0'] } }] }], 'yyyy', 'nnnn'],
    ['port 65536', [{ to: [{ operation: { ports: ['65536'] } }] }], 'yyyy', 'nnnn'],
    ['bad block', [{ from: [{ source: { ipBlocks: ['10.0.0.0/33'] } }] }], 'yyyy', 'nnnn'],
    [
      'bad excluded block',
      [{ from: [{ source: { namespaces: ['shop'], notIpBlocks: ['10.0.0.1', 'x'] } }] }],
      'yynn',
      'nnnn',
    ],
    [
      'URI as principal',
      [{ from: [{ source: { principals: ['spiffe://cluster.local/ns/shop/sa/web'] } }] }],
      'yyyy',
      'nnnn',
    ],
    ['star inside', [{ from: [{ source: { namespaces: ['s*p'] } }] }], 'yyyy', 'nnnn'],
    ['empty source', [{ from: [{ source: {} }] }], 'yyyy', 'nnnn'],
    ['no source', [{ from: [{}] }], 'yyyy', 'nnnn'],
    ['empty rule', [null], 'yyyy', 'nnnn'],
    ['unknown field', [{ form: [sourceWeb] }], 'yyyy', 'nnnn'],
    ['a string for a list', [{ from: [{ source: { namespaces: 'shop' } }] }], 'yyyy', 'nnnn'],
    ['a string for from', [{ from: 'shop' }], 'yyyy', 'nnnn'],
    ['when without values', [{ when: [{ key: 'source.ip' }] }], 'yyyy', 'nnnn'],
    [
      'one good rule beside a bad one',
      [{ from: [sourceWeb] }, { to: [{ operation: { ports: ['x'] } }] }],
      'yyyy',
      'yynn',
    ],
    ['everything', [{}], 'yyyy', 'yyyy'],
  ];
  test.each(table)('%s', (name, rules, deny, allow) => {
    const callers = [from(web), from(web, 443), from(evil), from(undefined)];
    for (const [action, expected] of [
      ['DENY', deny],
      ['ALLOW', allow],
    ] as const) {
      // biome-ignore format: a table
      const { policy: converted, problems } = convert({ action, rules: rules as Rules });
      const decided = callers.map((caller) => (matches(converted?.authorization ?? {}, caller) ? 'y' : 'n')).join('');
      expect(decided, action).toMatch(new RegExp(`^${expected}$`));
      expect(problems.length > 0, problems.join()).toBe(name !== 'L4 only' && name !== 'everything');
    }
  });
});

describe('PeerAuthentication', () => {
  type Mode = 'STRICT' | 'PERMISSIVE' | 'DISABLE' | 'UNSET' | undefined;
  const peer = (
    name: string,
    namespace: string,
    mode: string | undefined,
    labels?: Record<string, string>,
    ports?: Record<string, string>,
  ): PeerAuthentication => ({
    metadata: { name, namespace },
    spec: {
      ...(labels && { selector: { matchLabels: labels } }),
      ...(mode !== undefined && { mtls: { mode } }),
      ...(ports && {
        portLevelMtls: Object.fromEntries(Object.entries(ports).map(([port, m]) => [port, { mode: m }])),
      }),
    },
  });
  const pod: Pod = { metadata: { name: 'a', uid: 'a', namespace: 'shop', labels: { app: 'db' } } };

  test('every combination of mesh, namespace, workload and port mode decides each port as the formula says', () => {
    const modes: Mode[] = [undefined, 'UNSET', 'PERMISSIVE', 'DISABLE', 'STRICT'];
    const set = (mode: Mode): string | undefined => (mode === undefined || mode === 'UNSET' ? undefined : mode);
    let combinations = 0;
    for (const mesh of modes)
      for (const namespace of modes)
        for (const workload of modes)
          for (const port of modes) {
            const objects: PeerAuthentication[] = [];
            if (mesh) objects.push(peer('mesh', 'istio-system', mesh));
            if (namespace) objects.push(peer('ns', 'shop', namespace));
            if (workload || port) {
              objects.push(peer('wl', 'shop', workload, { app: 'db' }, port ? { 8080: port, 9090: port } : undefined));
            }
            const result = buildPeerAuthentications(objects);
            const key = result.policyOf(pod);
            const authorization = key === undefined ? {} : result.policies.get(key);
            expect(authorization).toBeDefined();
            const base = set(workload) ?? set(namespace) ?? set(mesh) ?? 'PERMISSIVE';
            for (const [number, mode] of [
              [8080, set(port) ?? base],
              [9090, set(port) ?? base],
              [80, base],
            ] as const) {
              // biome-ignore format: a table
              const strict = mode === 'STRICT';
              const where = `${mesh} ${namespace} ${workload} ${port} at ${number}`;
              expect(matches(authorization ?? {}, from(undefined, number)), where).toBe(strict);
              expect(matches(authorization ?? {}, from(web, number)), where).toBe(false);
            }
            combinations++;
          }
    expect(combinations).toBe(625);
  });

  test('names and shapes are those of Istio', () => {
    const result = buildPeerAuthentications([
      peer('db', 'shop', 'STRICT', { app: 'db' }, { 9090: 'PERMISSIVE', 8080: 'DISABLE', 7070: 'STRICT' }),
    ]);
    expect(result.policyOf(pod)).toBe('shop/converted_peer_authentication_db');
    expect(result.policies.get('shop/converted_peer_authentication_db')).toEqual({
      name: 'converted_peer_authentication_db',
      namespace: 'shop',
      scope: Scope.WORKLOAD_SELECTOR,
      action: Action.DENY,
      rules: [{ clauses: [{ matches: [{ notPrincipals: [{ presence: {} }], notDestinationPorts: [8080, 9090] }] }] }],
    });
    expect([...result.policies.keys()]).toContain(STATIC_STRICT_KEY);
    expect(STATIC_STRICT_KEY).toBe('istio-system/istio_converted_static_strict');
    expect(buildPeerAuthentications([]).policies.size).toBe(0);
  });

  test('the oldest of a level wins; the others are reported', () => {
    const old = {
      ...peer('z', 'shop', 'PERMISSIVE'),
      metadata: { name: 'z', namespace: 'shop', creationTimestamp: '2020-01-01T00:00:00Z' },
    };
    const young = {
      ...peer('a', 'shop', 'STRICT'),
      metadata: { name: 'a', namespace: 'shop', creationTimestamp: '2024-01-01T00:00:00Z' },
    };
    const result = buildPeerAuthentications([young, old]);
    expect(result.policyOf(pod)).toBeUndefined();
    expect(result.problems.map(({ object }) => object)).toEqual(['PeerAuthentication shop/a']);
  });

  test('a selector in the root namespace is ignored', () => {
    const result = buildPeerAuthentications([peer('x', 'istio-system', 'STRICT', { app: 'db' })]);
    expect(result.policyOf(pod)).toBeUndefined();
    expect(result.problems).toHaveLength(1);
  });

  test.each([
    ['an unknown mode', peer('x', 'shop', 'strict')],
    ['an unknown mode of a workload', peer('x', 'shop', 'MUTUAL', { app: 'db' })],
    ['an unreadable STRICT port', peer('x', 'shop', 'PERMISSIVE', { app: 'db' }, { http: 'STRICT' })],
    [
      'a port above 65535 that is STRICT',
      peer('x', 'shop', undefined, { app: 'db' }, { 65616: 'STRICT', 80: 'STRICT' }),
    ],
  ])('%s refuses plaintext and is reported', (_name, object) => {
    const result = buildPeerAuthentications([object]);
    expect(result.policyOf(pod)).toBe(STATIC_STRICT_KEY);
    expect(result.problems).toHaveLength(1);
  });

  test('an unreadable PERMISSIVE port opens nothing', () => {
    const result = buildPeerAuthentications([peer('x', 'shop', 'STRICT', { app: 'db' }, { http: 'PERMISSIVE' })]);
    expect(result.policyOf(pod)).toBe(STATIC_STRICT_KEY);
    expect(result.problems).toHaveLength(1);
  });
});
