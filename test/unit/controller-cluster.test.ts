/** Parts of the controller of a cluster that need no API: who is let in, what is kept of objects, rotation, conditions. */
import { X509Certificate } from 'node:crypto';
import { beforeEach, describe, expect, test } from 'vitest';
import { convertAuthorizationPolicy } from '../../src/controller/authorization-policies.ts';
import { Refusal, Unavailable } from '../../src/controller/callers.ts';
import { ClusterCallers } from '../../src/controller/cluster/callers.ts';
import {
  pickAuthorizationPolicy,
  pickNode,
  pickPeerAuthentication,
  pickPod,
} from '../../src/controller/cluster/picks.ts';
import { makeRoot, readRootSecret, selfSignedData } from '../../src/controller/cluster/root-secret.ts';
import { nextStep, overlapMs } from '../../src/controller/cluster/rotation.ts';
import { type Condition, judgePeerAuthentication, mergeConditions } from '../../src/controller/cluster/status.ts';
import type { Pod } from '../../src/controller/objects.ts';
import { Places } from '../../src/controller/places.ts';
import { convertServiceEntry } from '../../src/controller/service-entries.ts';
import { parseAccounts } from '../../src/controller/settings.ts';
import { type Api, ApiError } from '../../src/mesh/api/index.ts';

describe('callers', () => {
  const status = {
    authenticated: true,
    audiences: ['istio-ca'],
    user: {
      username: 'system:serviceaccount:sys:proxy',
      groups: ['system:serviceaccounts', 'system:authenticated'],
      extra: {
        'authentication.kubernetes.io/pod-name': ['proxy-1'],
        'authentication.kubernetes.io/pod-uid': ['uid-1'],
      },
    },
  };
  const pod = (uid = 'uid-1', serviceAccountName = 'proxy', nodeName = 'n1'): Pod => ({
    metadata: { name: 'proxy-1', namespace: 'sys', uid },
    spec: { serviceAccountName, nodeName },
  });
  let answer: object | Error;
  let asked: number;
  let clock: number;
  let known: Pod | undefined;
  let callers: ClusterCallers;

  beforeEach(() => {
    [answer, asked, clock, known] = [status, 0, 0, pod()];
    const api = {
      request: async () => {
        asked++;
        if (answer instanceof Error) throw answer;
        return { status: answer };
      },
    } as unknown as Api;
    callers = new ClusterCallers({
      api,
      trusted: new Set(['sys/proxy']),
      pod: (key) => (key === 'sys/proxy-1' ? known : undefined),
      places: new Places(),
      now: () => clock,
    });
  });

  test('are the node of their pod', async () => {
    const caller = await callers.authenticate('t');
    expect(caller).toEqual({ node: 'n1', pod: { key: 'sys/proxy-1', uid: 'uid-1' } });
    expect(callers.remains(caller)).toBe(true);
    known = pod('uid-2');
    expect(callers.remains(caller)).toBe(false);
    known = undefined;
    expect(callers.remains(caller)).toBe(false);
  });

  const refused: readonly (readonly [string, () => void, RegExp])[] = [
    ['a token that the API does not know', () => (answer = { authenticated: false, error: 'expired' }), /expired/],
    ['an API that says nothing of audiences', () => (answer = { ...status, audiences: undefined }), /audience/],
    ['another audience', () => (answer = { ...status, audiences: ['other'] }), /audience/],
    ['a user', () => (answer = { ...status, user: { ...status.user, username: 'admin' } }), /no service account/],
    [
      'a user who is called like one',
      () => (answer = { ...status, user: { ...status.user, groups: [] } }),
      /no service account/,
    ],
    [
      'another service account',
      () => (answer = { ...status, user: { ...status.user, username: 'system:serviceaccount:sys:other' } }),
      /sys\/other is not one of node proxies/,
    ],
    [
      'the same name in another namespace',
      () => (answer = { ...status, user: { ...status.user, username: 'system:serviceaccount:evil:proxy' } }),
      /evil\/proxy is not/,
    ],
    ['a token of no pod', () => (answer = { ...status, user: { ...status.user, extra: {} } }), /not bound to a pod/],
    ['a pod that is no more', () => (known = undefined), /no running pod/],
    ['a pod that was replaced by one of the same name', () => (known = pod('uid-2')), /another one/],
    ['a pod with another service account', () => (known = pod('uid-1', 'other')), /does not have service account/],
    ['a pod that is nowhere', () => (known = pod('uid-1', 'proxy', '')), /on no node/],
  ];
  for (const [what, arrange, reason] of refused) {
    test(`${what} is refused`, async () => {
      arrange();
      await expect(callers.authenticate('t')).rejects.toThrow(reason);
      await expect(callers.authenticate('t')).rejects.toBeInstanceOf(Refusal);
    });
  }

  test('are asked of the API once for a while, a pod that is gone is noticed at once', async () => {
    await Promise.all([callers.authenticate('t'), callers.authenticate('t')]);
    expect(asked).toBe(1);
    await callers.authenticate('u');
    expect(asked).toBe(2);
    known = undefined;
    await expect(callers.authenticate('t')).rejects.toThrow(/no running pod/);
    expect(asked).toBe(2);
    known = pod();
    clock = 31_000;
    answer = { authenticated: false };
    await expect(callers.authenticate('t')).rejects.toBeInstanceOf(Refusal);
    expect(asked).toBe(3);
    clock += 4000;
    await expect(callers.authenticate('t')).rejects.toBeInstanceOf(Refusal);
    expect(asked).toBe(3);
    clock += 2000;
    answer = status;
    await callers.authenticate('t');
  });

  test('are nobody while the API is away, which is not remembered', async () => {
    answer = new ApiError(0, 'Unreachable', 'away');
    await expect(callers.authenticate('t')).rejects.toBeInstanceOf(Unavailable);
    answer = status;
    await expect(callers.authenticate('t')).resolves.toMatchObject({ node: 'n1' });
  });
});

describe('places', () => {
  const at = (node: string, serviceAccountName: string, phase = 'Running'): Pod => ({
    metadata: { name: 'p', namespace: 'a', uid: 'u' },
    spec: { nodeName: node, serviceAccountName },
    status: { phase },
  });

  test('are those of pods that run, as long as one does', () => {
    const places = new Places();
    places.update(
      new Map([
        ['a/p', at('n1', 'x')],
        ['a/q', at('n1', 'x')],
      ]),
    );
    places.update(new Map([['a/p', at('n2', 'x')]]));
    expect([places.has('n1', 'a', 'x'), places.has('n2', 'a', 'x'), places.has('n1', 'a', 'y')]).toEqual([
      true,
      true,
      false,
    ]);
    places.update(new Map([['a/q', undefined]]));
    expect(places.has('n1', 'a', 'x')).toBe(false);
    places.update(new Map([['a/p', at('n2', 'x', 'Succeeded')]]));
    expect(places.has('n2', 'a', 'x')).toBe(false);
    places.replace([at('n3', 'z')]);
    expect(places.has('n3', 'a', 'z')).toBe(true);
  });
});

describe('what is kept of objects', () => {
  test('is of a pod nothing that its author could use to say that it is captured by a path of this machine', () => {
    const pod = pickPod({
      metadata: { name: 'p', namespace: 'n', annotations: { 'ebbtide.dev/netns': '/proc/1/ns/net', other: 'x' } },
      spec: {
        containers: [{ name: 'c', image: 'i', ports: [{ containerPort: 1 }, { name: 'web', containerPort: 2 }] }],
      },
      status: { podIP: '10.0.0.1', podIPs: [{ ip: '10.0.0.1' }] },
    } as never);
    expect(pod.metadata.annotations).toBeUndefined();
    expect(pod.spec?.containers).toEqual([{ ports: [{ name: 'web', containerPort: 2, protocol: 'TCP' }] }]);
    // Without conditions it is not ready yet.
    expect(pod.status).toEqual({ podIP: '10.0.0.1', conditions: [] });
  });

  test('is of a node its place only', () => {
    const labels = { 'topology.kubernetes.io/zone': 'z', 'kubernetes.io/hostname': 'h' };
    expect(pickNode({ metadata: { name: 'n', labels } } as never)).toEqual({
      metadata: { name: 'n', labels: { 'topology.kubernetes.io/zone': 'z' } },
    });
  });

  test('is of a policy that cannot be read that it refuses everything', () => {
    const bad = { metadata: { name: 'p', namespace: 'n', generation: 3 }, spec: { selector: 'all', rules: [{}] } };
    const { policy, problems } = convertAuthorizationPolicy(pickAuthorizationPolicy(bad as never));
    // ALLOW of nothing, in the whole namespace.
    expect(policy).toMatchObject({ labels: undefined, authorization: { action: 0, scope: 1, rules: [] } });
    expect(problems.join()).toMatch(/unreadable: spec.selector must be a mapping/);
    const peer = { metadata: { name: 'p', namespace: 'n' }, spec: { mtls: 'STRICT' } };
    expect(pickPeerAuthentication(peer as never).spec?.mtls?.mode).toMatch(/^unreadable/);
  });
});

describe('rotation of the root', () => {
  const TTL = 3600;
  const step = async (data: Record<string, string>, annotations: Record<string, string>, at: Date) =>
    nextStep({ name: 's', resourceVersion: '1', data, annotations }, TTL, at);
  const apply = <T extends string | null>(into: Record<string, string>, change: Readonly<Record<string, T>>): void => {
    for (const [key, value] of Object.entries(change)) {
      if (value === null) delete into[key];
      else into[key] = value as string;
    }
  };

  test('announces when a fifth of the life is left, then switches, then drops, with a pause between', async () => {
    const born = new Date('2026-01-01T00:00:00Z');
    const root = await makeRoot(born);
    const data = selfSignedData(root.certificate, root.key, root.certificate);
    const annotations: Record<string, string> = {};
    const life = Date.parse(new X509Certificate(root.certificate).validTo) - born.getTime();
    expect(await step(data, annotations, new Date(born.getTime() + life * 0.79))).toBeUndefined();
    let now = new Date(born.getTime() + life * 0.81);
    const bundle = async () =>
      (await readRootSecret({ name: 's', resourceVersion: '', data, annotations }, now)).bundle;
    const first = new X509Certificate(await bundle()).fingerprint256;
    for (const phase of ['announce', 'switch', 'drop'] as const) {
      const due = await step(data, annotations, now);
      expect(due?.phase).toBe(phase);
      apply(data, due?.data ?? {});
      apply(annotations, due?.annotations ?? {});
      // What is in the Secret can be used at each moment.
      const count = (await bundle()).split('BEGIN CERTIFICATE').length - 1;
      expect(count).toBe(phase === 'drop' ? 1 : 2);
      const signer = new X509Certificate(data['ca-cert.pem'] ?? '').fingerprint256;
      expect(signer === first).toBe(phase === 'announce');
      now = new Date(now.getTime() + overlapMs(TTL) - 1);
      expect(await step(data, annotations, now)).toBeUndefined();
      now = new Date(now.getTime() + 1);
    }
    expect(await step(data, annotations, now)).toBeUndefined();
    expect(annotations).toEqual({});
    expect(Object.keys(data).sort()).toEqual([
      'ca-cert.pem',
      'ca-key.pem',
      'cert-chain.pem',
      'key.pem',
      'root-cert.pem',
    ]);
  });

  test('waits for longer than any certificate lives', () => {
    for (const ttl of [30, 3600, 86_400]) expect(overlapMs(ttl)).toBeGreaterThan(ttl * 1000);
  });
});

describe('conditions', () => {
  const now = new Date('2026-11-27T12:00:00.123Z');
  const want = { type: 'ebbtide.dev/Enforced', status: 'True', reason: 'Enforced', message: 'm' } as const;
  const have: Condition = { ...want, lastTransitionTime: '2026-01-01T00:00:00Z', observedGeneration: 2 };
  const other: Condition = { type: 'WaypointAccepted', status: 'True', reason: 'r', message: 'theirs' };

  test('are written only when they differ, and keep those of others and the time since when they are so', () => {
    expect(mergeConditions([other, have], [want], 2, now)).toBeUndefined();
    expect(mergeConditions([other, have], [want], 3, now)).toEqual([other, { ...have, observedGeneration: 3 }]);
    expect(mergeConditions([have], [{ ...want, status: 'False' }], 2, now)).toEqual([
      { ...want, status: 'False', lastTransitionTime: '2026-11-27T12:00:00Z', observedGeneration: 2 },
    ]);
    // What we do not say any more goes.
    const accepted: Condition = { ...other, type: 'ZtunnelAccepted' };
    expect(mergeConditions([accepted, have], [want], 2, now)).toEqual([have]);
  });

  test('of a PeerAuthentication tell whether it is ignored', () => {
    expect(judgePeerAuthentication([])).toMatchObject([{ status: 'True', reason: 'Enforced' }]);
    const older = ['an older one already covers the whole namespace; this one is ignored'];
    expect(judgePeerAuthentication(older)).toMatchObject([{ status: 'False', reason: 'NotEnforced' }]);
    expect(judgePeerAuthentication(['mtls.mode "X" is no mode'])).toMatchObject([{ reason: 'PartlyEnforced' }]);
  });
});

describe('a ServiceEntry', () => {
  const entry = (spec: object) => convertServiceEntry({ metadata: { name: 'e', namespace: 'n' }, spec } as never);
  const ports = [{ number: 443, name: 'https', protocol: 'HTTPS' }];

  test('becomes a service for each host', () => {
    const { services, problems } = entry({
      hosts: ['a.example', 'b.example'],
      addresses: ['10.0.0.1', '10.1.0.0/16', '2001:db8::1/128'],
      ports,
      resolution: 'STATIC',
      endpoints: [{ address: '192.0.2.1' }],
    });
    expect(problems).toEqual([]);
    expect(services.map(({ key }) => key)).toEqual(['n/a.example', 'n/b.example']);
    expect(services[0]?.aliases).toEqual(['/10.0.0.1', '/10.1.0.0/16', '/2001:db8::1']);
    expect(services[0]?.service.addresses?.map(({ length }) => length)).toEqual([undefined, 16, undefined]);
    expect(services[0]?.service.loadBalancing).toBeUndefined();
  });

  test('without resolution passes through', () => {
    expect(entry({ hosts: ['a.example'], ports }).services[0]?.service.loadBalancing).toEqual({
      mode: 3,
      healthPolicy: 1,
    });
  });

  const unsupported: readonly (readonly [string, object, RegExp])[] = [
    ['a wildcard', { hosts: ['*.example'], ports }, /wildcard, which is not supported/],
    ['resolution by DNS', { hosts: ['a.example'], ports, resolution: 'DNS' }, /by DNS is not supported/],
    ['another resolution', { hosts: ['a.example'], ports, resolution: 'DYNAMIC_DNS' }, /DYNAMIC_DNS is not supported/],
    [
      'an endpoint with a name',
      { hosts: ['a.example'], ports, resolution: 'STATIC', endpoints: [{ address: 'x.y' }] },
      /no IP address/,
    ],
    ['an address that is none', { hosts: ['a.example'], ports, addresses: ['10.0.0'] }, /neither an address/],
    ['exportTo by name', { hosts: ['a.example'], ports, exportTo: ['team'] }, /exportTo/],
  ];
  for (const [what, spec, message] of unsupported) {
    test(`says of ${what} that it is not supported`, () => expect(entry(spec).problems.join()).toMatch(message));
  }
});

test('trusted accounts are a list, and nonsense is refused', () => {
  expect([...parseAccounts('a/b, c/d,')]).toEqual(['a/b', 'c/d']);
  for (const text of ['a', 'a/b/c', 'A/b', '*/b'])
    expect(() => parseAccounts(text), text).toThrow(/--trusted-accounts/);
});
