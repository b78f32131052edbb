/** Every form of policy that this layer decides, written as YAML and tried by real clients; one mesh for all. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  type AccessLine,
  authorizationPolicy,
  type Lab,
  type Manifest,
  type Pod,
  peerAuthentication,
  waitFor,
} from '../../src/lab/index.ts';
import { startController } from '../../src/lab/mesh.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { client, PORT, startServer } from '../lib/peers.ts';
import { startDanglingController } from '../lib/programs/dangling-controller.ts';

const ROOT_NAMESPACE = 'istio-system';
/** Alice is in the server's namespace, bob in another one of the mesh, the outsider outside, all on the other node. */
type Who = 'alice' | 'bob' | 'outsider' | 'neighbour';
const ALL: readonly Who[] = ['alice', 'bob', 'outsider', 'neighbour'];
const PORTS = [PORT.whoami, PORT.watch] as const;
type Port = (typeof PORTS)[number];

async function formsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('friends', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const alice = await lab.pod({ name: 'alice', namespace: 'meshed', node: 1 });
  const bob = await lab.pod({ name: 'bob', namespace: 'friends', node: 1 });
  const outsider = await lab.pod({ name: 'outsider', namespace: 'plain', node: 1 });
  // On the server's own node: what it asks never leaves the node.
  const neighbour = await lab.pod({ name: 'neighbour', namespace: 'friends', node: 2 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  await lab.startMesh();
  for (const pod of [alice, bob, neighbour]) await captured(lab, pod, server);
  return { alice, bob, outsider, neighbour, server };
}

type Made = Awaited<ReturnType<typeof formsLab>> & { lab: Lab };

const selector = { matchLabels: { app: 'server' } };

/** What is refused to whom: on all ports, or on these. */
type Refused = Partial<Record<Who, 'all' | readonly Port[]>>;
interface Row {
  readonly name: string;
  readonly policies: (made: Made) => readonly Manifest[];
  readonly refused: Refused;
  /** Default: policy-denied. */
  readonly reason?: 'policy-denied' | 'policy-no-allow';
  /** Words with which the controller reports the object. */
  readonly reported?: string;
}

const allow = (rules: unknown, more: Record<string, unknown> = {}) => [
  authorizationPolicy('form', 'meshed', { selector, action: 'ALLOW', rules, ...more }),
];
const deny = (rules: unknown, more: Record<string, unknown> = {}) => [
  authorizationPolicy('form', 'meshed', { selector, action: 'DENY', rules, ...more }),
];
const source = (of: Record<string, unknown>) => [{ from: [{ source: of }] }];
const operation = (of: Record<string, unknown>) => [{ to: [{ operation: of }] }];
const when = (key: string, of: Record<string, unknown>) => [{ when: [{ key, ...of }] }];
const principal = (pod: Pod) => pod.identity.slice('spiffe://'.length);
const watch = `${PORT.watch}`;

/** STRICT or PERMISSIVE for the server, with other modes on some ports. */
function workloadPeers(mode: string, ports: Readonly<Record<string, string>> = {}): Manifest {
  const portLevelMtls = Object.fromEntries(Object.entries(ports).map(([port, of]) => [port, { mode: of }]));
  const base = peerAuthentication('server', 'meshed', mode);
  const more = Object.keys(ports).length === 0 ? {} : { portLevelMtls };
  return { ...base, spec: { selector, mtls: { mode }, ...more } };
}

const everybody: Refused = { alice: 'all', bob: 'all', outsider: 'all', neighbour: 'all' };
const but = (...who: readonly Who[]): Refused =>
  Object.fromEntries(ALL.filter((each) => !who.includes(each)).map((each) => [each, 'all']));
const only = (...who: readonly Who[]): Refused => Object.fromEntries(who.map((each) => [each, 'all']));
const noAllow = { reason: 'policy-no-allow' } as const;

const ROWS: readonly Row[] = [
  { name: 'no policy', policies: () => [], refused: {} },
  // Sources.
  {
    name: 'principals, exact',
    policies: ({ alice }) => allow(source({ principals: [principal(alice)] })),
    refused: but('alice'),
    ...noAllow,
  },
  {
    name: 'principals, prefix',
    policies: () => allow(source({ principals: ['cluster.local/ns/friends/*'] })),
    refused: but('bob', 'neighbour'),
    ...noAllow,
  },
  {
    name: 'principals, suffix',
    policies: () => deny(source({ principals: ['*/sa/bob'] })),
    refused: only('bob'),
  },
  {
    name: 'principals, presence',
    policies: () => allow(source({ principals: ['*'] })),
    refused: only('outsider'),
    ...noAllow,
  },
  {
    name: 'notPrincipals, presence: whoever has none',
    policies: () => deny(source({ notPrincipals: ['*'] })),
    refused: only('outsider'),
  },
  {
    name: 'notPrincipals, exact: everybody else',
    policies: ({ bob }) => deny(source({ notPrincipals: [principal(bob)] })),
    refused: but('bob'),
  },
  {
    name: 'namespaces, exact',
    policies: () => deny(source({ namespaces: ['meshed'] })),
    refused: only('alice'),
  },
  {
    name: 'namespaces, prefix',
    policies: () => allow(source({ namespaces: ['fri*'] })),
    refused: but('bob', 'neighbour'),
    ...noAllow,
  },
  {
    name: 'notNamespaces',
    policies: () => deny(source({ notNamespaces: ['meshed', 'nowhere'] })),
    refused: but('alice'),
  },
  {
    name: 'ipBlocks, one address and one block',
    policies: ({ alice, neighbour }) =>
      deny(source({ ipBlocks: [alice.addresses.v4, `${neighbour.addresses.v4}/24`] })),
    refused: only('alice', 'neighbour'),
  },
  {
    name: 'notIpBlocks',
    policies: () => deny(source({ notIpBlocks: ['10.244.1.0/24'] })),
    refused: only('neighbour'),
  },
  {
    name: 'remoteIpBlocks, which only a gateway knows: an ALLOW of them allows nothing',
    policies: () => allow(source({ remoteIpBlocks: ['0.0.0.0/0'] })),
    refused: everybody,
    ...noAllow,
    reported: 'remoteIpBlocks',
  },
  {
    name: 'serviceAccounts, in the own namespace and in another',
    policies: () => allow(source({ serviceAccounts: ['alice', 'friends/neighbour'] })),
    refused: but('alice', 'neighbour'),
    ...noAllow,
  },
  {
    name: 'notServiceAccounts',
    policies: () => deny(source({ notServiceAccounts: ['friends/bob'] })),
    refused: but('bob'),
  },
  {
    name: 'fields of one source are ANDed',
    policies: () => deny(source({ namespaces: ['friends'], notPrincipals: ['*/sa/bob'] })),
    refused: only('neighbour'),
  },
  {
    name: 'sources of one rule are ORed',
    policies: () =>
      deny([{ from: [{ source: { namespaces: ['meshed'] } }, { source: { principals: ['*/sa/neighbour'] } }] }]),
    refused: only('alice', 'neighbour'),
  },
  // Operations.
  {
    name: 'ports',
    policies: () => deny(operation({ ports: [watch] })),
    refused: Object.fromEntries(ALL.map((who) => [who, [PORT.watch]])),
  },
  {
    name: 'notPorts',
    policies: () => deny(operation({ notPorts: [watch] })),
    refused: Object.fromEntries(ALL.map((who) => [who, [PORT.whoami]])),
  },
  {
    name: 'from and to of one rule are ANDed',
    policies: () =>
      deny([{ from: [{ source: { namespaces: ['friends'] } }], to: [{ operation: { ports: [watch] } }] }]),
    refused: { bob: [PORT.watch], neighbour: [PORT.watch] },
  },
  {
    name: 'several rules are ORed',
    policies: () =>
      allow([
        { from: [{ source: { principals: ['*/sa/alice'] } }] },
        { from: [{ source: { namespaces: ['friends'] } }], to: [{ operation: { ports: [watch] } }] },
      ]),
    refused: { bob: [PORT.whoami], neighbour: [PORT.whoami], outsider: 'all' },
    ...noAllow,
  },
  {
    name: 'DENY with parts of layer 7 denies what the rest of the rule says',
    policies: () =>
      deny([{ from: [{ source: { namespaces: ['friends'] } }], to: [{ operation: { methods: ['GET'] } }] }]),
    refused: only('bob', 'neighbour'),
    reported: 'methods',
  },
  {
    name: 'DENY with layer 7 alone denies everything',
    policies: () => deny(operation({ paths: ['/admin'] })),
    refused: everybody,
    reported: 'paths',
  },
  {
    name: 'ALLOW with parts of layer 7 allows nothing',
    policies: () => allow([{ from: [{ source: { principals: ['*'] } }], to: [{ operation: { hosts: ['x'] } }] }]),
    refused: everybody,
    ...noAllow,
    reported: 'hosts',
  },
  // Conditions.
  {
    name: 'when source.ip',
    policies: ({ bob }) => deny(when('source.ip', { values: [bob.addresses.v4] })),
    refused: only('bob'),
  },
  {
    name: 'when source.namespace, notValues',
    policies: () => deny(when('source.namespace', { notValues: ['friends'] })),
    refused: only('alice', 'outsider'),
  },
  {
    name: 'when source.principal',
    policies: () => allow(when('source.principal', { values: ['*/sa/alice', 'cluster.local/ns/friends/sa/b*'] })),
    refused: but('alice', 'bob'),
    ...noAllow,
  },
  {
    name: 'when destination.ip',
    policies: ({ server }) => deny(when('destination.ip', { values: [server.addresses.v4] })),
    refused: everybody,
  },
  {
    name: 'when destination.ip of somebody else',
    policies: ({ alice }) => deny(when('destination.ip', { values: [alice.addresses.v4] })),
    refused: {},
  },
  {
    name: 'when destination.port, notValues',
    policies: () => allow(when('destination.port', { notValues: [watch] })),
    refused: Object.fromEntries(ALL.map((who) => [who, [PORT.watch]])),
    ...noAllow,
  },
  {
    name: 'conditions of one rule are ANDed',
    policies: () =>
      deny([
        {
          when: [
            { key: 'source.namespace', values: ['friends'] },
            { key: 'destination.port', values: [watch] },
          ],
        },
      ]),
    refused: { bob: [PORT.watch], neighbour: [PORT.watch] },
  },
  {
    name: 'an unknown when key: an ALLOW allows nothing',
    policies: () => allow(when('request.headers[x-user]', { values: ['*'] })),
    refused: everybody,
    ...noAllow,
    reported: 'request.headers[x-user]',
  },
  {
    name: 'an unknown when key: a DENY denies what the rest of the rule says',
    policies: () =>
      deny([{ from: [{ source: { namespaces: ['meshed'] } }], when: [{ key: 'sourse.ip', values: ['10.0.0.1'] }] }]),
    refused: only('alice'),
    reported: 'sourse.ip',
  },
  // Whole policies.
  { name: 'ALLOW with an empty spec allows nothing', policies: () => allow(undefined), refused: everybody, ...noAllow },
  {
    name: 'a policy of which only spec: {} is written refuses its whole namespace',
    policies: () => [authorizationPolicy('form', 'meshed', {})],
    refused: everybody,
    ...noAllow,
  },
  { name: 'DENY without rules denies nothing', policies: () => deny(undefined), refused: {} },
  { name: 'a rule {} of an ALLOW allows everything', policies: () => allow([{}]), refused: {} },
  { name: 'a rule {} of a DENY denies everything', policies: () => deny([{}]), refused: everybody },
  {
    name: 'DENY goes before ALLOW',
    policies: () => [
      authorizationPolicy('form-allow', 'meshed', { selector, rules: [{}] }),
      authorizationPolicy('form-deny', 'meshed', { action: 'DENY', rules: source({ namespaces: ['friends'] }) }),
    ],
    refused: only('bob', 'neighbour'),
  },
  {
    name: 'ALLOWs of mesh, namespace and workload are ORed',
    policies: () => [
      authorizationPolicy('form', ROOT_NAMESPACE, { rules: source({ principals: ['*/sa/alice'] }) }),
      authorizationPolicy('form', 'meshed', { rules: source({ principals: ['*/sa/bob'] }) }),
      authorizationPolicy('form-workload', 'meshed', { selector, rules: source({ principals: ['*/sa/neighbour'] }) }),
    ],
    refused: only('outsider'),
    ...noAllow,
  },
  {
    name: 'a policy of another namespace is none of the server',
    policies: () => [authorizationPolicy('form', 'friends', { action: 'DENY', rules: [{}] })],
    refused: {},
  },
  {
    name: 'a selector that does not match is none of the server',
    policies: () => deny([{}], { selector: { matchLabels: { app: 'another' } } }),
    refused: {},
  },
  // PeerAuthentication.
  {
    name: 'STRICT, mesh-wide',
    policies: () => [peerAuthentication('default', ROOT_NAMESPACE, 'STRICT')],
    refused: only('outsider'),
  },
  {
    name: 'STRICT for the namespace',
    policies: () => [peerAuthentication('default', 'meshed', 'STRICT')],
    refused: only('outsider'),
  },
  { name: 'STRICT for the workload', policies: () => [workloadPeers('STRICT')], refused: only('outsider') },
  {
    name: 'STRICT mesh-wide, PERMISSIVE for the namespace',
    policies: () => [
      peerAuthentication('default', ROOT_NAMESPACE, 'STRICT'),
      peerAuthentication('default', 'meshed', 'PERMISSIVE'),
    ],
    refused: {},
  },
  {
    name: 'STRICT with a PERMISSIVE port',
    policies: () => [workloadPeers('STRICT', { [watch]: 'PERMISSIVE' })],
    refused: { outsider: [PORT.whoami] },
  },
  {
    name: 'PERMISSIVE with a STRICT port',
    policies: () => [workloadPeers('PERMISSIVE', { [watch]: 'STRICT' })],
    refused: { outsider: [PORT.watch] },
  },
  {
    name: 'UNSET inherits STRICT from the namespace, a port is excepted',
    policies: () => [peerAuthentication('default', 'meshed', 'STRICT'), workloadPeers('UNSET', { [watch]: 'DISABLE' })],
    refused: { outsider: [PORT.whoami] },
  },
];

describe('forms of policy', () => {
  let made: Made;
  let before: Manifest[] = [];
  let rows = 0;
  beforeAll(async () => {
    made = await labWith(formsLab);
  });
  afterAll(() => made?.lab.close());

  for (const row of ROWS) {
    it(row.name, async () => {
      const { lab, server } = made;
      const policies = row.policies(made);
      // A policy of no effect, by which it is known that all of this row is in force and nothing of the one before.
      const sign = authorizationPolicy(`row-${++rows}`, 'meshed', {
        selector,
        action: 'DENY',
        rules: operation({ ports: ['1'] }),
      });
      const kept = policies.map((policy) => lab.manifests.file(policy));
      lab.manifests.remove(...before.filter((policy) => !kept.includes(lab.manifests.file(policy))));
      lab.manifests.write(...policies);
      lab.manifests.write(sign);
      before = [...policies, sign];
      await inForce(lab, rows);

      const mark = lab.node(2).accessLog().length;
      const said = await Promise.all(ALL.map((who) => probe(made[who], server)));
      const expected: Record<string, Record<string, string>> = {};
      const seen: Record<string, Record<string, string>> = {};
      for (const [index, who] of ALL.entries()) {
        const refused = row.refused[who] ?? [];
        const word = (port: Port) => (refused === 'all' || refused.includes(port) ? 'refused' : 'allowed');
        expected[who] = Object.fromEntries(PORTS.map((port) => [port, word(port)]));
        seen[who] = Object.fromEntries(
          Object.entries(said[index] ?? {}).map(([port, outcome]) => [
            port,
            outcome === 'data' ? 'allowed' : 'refused',
          ]),
        );
      }
      expect(seen, JSON.stringify(said)).toEqual(expected);
      for (const who of ALL) {
        for (const port of PORTS) {
          if (expected[who]?.[port] !== 'refused') continue;
          const line = await refusal(lab, mark, made[who], server, port);
          expect(line, `${who} at port ${port}`).toMatchObject({ reason: row.reason ?? 'policy-denied' });
          if (who !== 'outsider') expect(line['src.identity']).toBe(made[who].identity);
        }
      }
      if (row.reported !== undefined) expect(lab.controller?.tail(40)).toContain(row.reported);
    });
  }

  it('a workload that names a policy which nobody sent refuses everybody, and says which', async () => {
    const { lab, server } = made;
    lab.manifests.remove(...before);
    before = [];
    await waitFor('a mesh without policy', async () => open(await probe(made.alice, server)));
    await lab.controller?.stop();
    const dangling = await startDanglingController(lab, 'server', 'meshed/nowhere');
    try {
      await waitFor('everybody to be refused', async () => {
        const said = await Promise.all(ALL.map((who) => probe(made[who], server)));
        return said.every((outcomes) => Object.values(outcomes).every((outcome) => outcome !== 'data'));
      });
      const mark = lab.node(2).accessLog().length;
      for (const who of ALL) {
        await probe(made[who], server);
        const line = await refusal(lab, mark, made[who], server, PORT.whoami);
        expect(line, who).toMatchObject({ reason: 'policy-unknown', error: expect.stringContaining('meshed/nowhere') });
      }
      // The others of that node are not concerned.
      expect(await lab.node(2).fetch(15021, '/healthz/ready')).toMatchObject({ code: 0 });
    } finally {
      await dangling.stop();
    }
    lab.controller = await startController(lab.ground, {});
    await waitFor('the true controller to be heard', async () => open(await probe(made.alice, server)), {
      timeoutMs: 30_000,
      hint: () => processes(lab),
    });
    expect(await client(made.bob, 'echo', server.addresses.v4, PORT.echo)).toEqual({ ok: true });
  });
});

const open = (outcomes: Readonly<Record<string, string>>): boolean =>
  Object.values(outcomes).every((outcome) => outcome === 'data');

async function probe(from: Pod, server: Pod): Promise<Record<string, string>> {
  const [first, ...more] = PORTS;
  return (await client(from, 'probe', server.addresses.v4, first, more.join(','))) as Record<string, string>;
}

/** Resolves when the server's proxy holds everything of this row and nothing of the one before. */
async function inForce(lab: Lab, row: number): Promise<void> {
  await waitFor(
    `row ${row} to be in force`,
    async () => {
      const dump = await lab.node(2).configDump();
      const names = (dump.policies as { name: string }[]).map(({ name }) => name);
      const workloads = dump.workloads as { name: string; authorizationPolicies: string[] }[];
      const server = workloads.find(({ name }) => name === 'server');
      const listed = server?.authorizationPolicies.includes(`meshed/row-${row}`) ?? false;
      return listed && names.includes(`row-${row}`) && !names.includes(`row-${row - 1}`);
    },
    { hint: () => processes(lab) },
  );
}

/** The access log's line of a refused connection, from the proxy that refused it. */
async function refusal(lab: Lab, mark: number, from: Pod, server: Pod, port: number): Promise<AccessLine> {
  return waitFor(
    `a line of ${from.id} being refused at port ${port}`,
    () =>
      lab
        .node(2)
        .accessLog()
        .slice(mark)
        .find(
          (line) =>
            line.direction === 'inbound' &&
            String(line['src.addr']).startsWith(`${from.addresses.v4}:`) &&
            line['dst.addr'] === `${server.addresses.v4}:${port}` &&
            line.reason !== undefined,
        ),
    { timeoutMs: 5000, hint: () => processes(lab) },
  );
}
