/** Policy written into the folder acts on new connections and on open ones. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  authorizationPolicy,
  type Lab,
  type Manifest,
  type Pod,
  peerAuthentication,
  waitFor,
} from '../../src/lab/index.ts';
import { patient } from '../../src/lab/wait.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { Background, client, clientArgv, PORT, startServer } from '../lib/peers.ts';

/** From the file's appearance to its effect. */
const WITHIN_MS = patient(1000);

async function policyLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('friends', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const alice = await lab.pod({ name: 'alice', namespace: 'meshed', node: 1 });
  const bob = await lab.pod({ name: 'bob', namespace: 'friends', node: 1 });
  const outsider = await lab.pod({ name: 'outsider', namespace: 'plain', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  await lab.startMesh();
  for (const pod of [alice, bob]) await captured(lab, pod, server);
  return { alice, bob, outsider, server };
}

const selector = { matchLabels: { app: 'server' } };
const principal = (pod: Pod) => pod.identity.slice('spiffe://'.length);

describe('policy', () => {
  let made: Awaited<ReturnType<typeof policyLab>> & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(policyLab);
  });
  afterAll(() => made?.lab.close());

  type Who = 'alice' | 'bob' | 'outsider';
  const cases: readonly { name: string; policy: () => Manifest; denied: readonly Who[]; allowed: readonly Who[] }[] = [
    {
      name: 'DENY of a principal',
      policy: () =>
        authorizationPolicy('deny-alice', 'meshed', {
          selector,
          action: 'DENY',
          rules: [{ from: [{ source: { principals: [principal(made.alice)] } }] }],
        }),
      denied: ['alice'],
      allowed: ['bob', 'outsider'],
    },
    {
      name: 'ALLOW of a namespace',
      policy: () =>
        authorizationPolicy('allow-friends', 'meshed', {
          selector,
          action: 'ALLOW',
          rules: [{ from: [{ source: { namespaces: ['friends'] } }] }],
        }),
      denied: ['alice', 'outsider'],
      allowed: ['bob'],
    },
    {
      name: 'DENY of an address for the whole namespace',
      policy: () =>
        authorizationPolicy('deny-address', 'meshed', {
          action: 'DENY',
          rules: [{ from: [{ source: { ipBlocks: [made.outsider.addresses.v4] } }] }],
        }),
      denied: ['outsider'],
      allowed: ['alice', 'bob'],
    },
    {
      name: 'DENY of a port, by notPrincipals',
      policy: () =>
        authorizationPolicy('deny-port', 'meshed', {
          selector,
          action: 'DENY',
          rules: [
            {
              from: [{ source: { notPrincipals: [principal(made.bob)] } }],
              to: [{ operation: { ports: [`${PORT.watch}`] } }],
            },
          ],
        }),
      denied: ['alice', 'outsider'],
      allowed: ['bob'],
    },
    {
      name: 'STRICT',
      policy: () => peerAuthentication('default', 'meshed', 'STRICT'),
      denied: ['outsider'],
      allowed: ['alice', 'bob'],
    },
  ];

  for (const { name, policy, denied, allowed } of cases) {
    it(`${name}: refuses new connections, cuts open ones, leaves the others, and ends when its file is removed`, async () => {
      const { lab, server } = made;
      const address = server.addresses.v4;
      const held = new Map<Who, Background>();
      for (const who of [...denied, ...allowed]) {
        const connection = await Background.start(made[who], 'hold', address, PORT.watch, 20);
        await connection.said('open');
        held.set(who, connection);
      }
      const manifest = policy();
      const written = Date.now();
      lab.manifests.write(manifest);
      try {
        for (const who of denied) {
          const cut = await held.get(who)?.result();
          expect(['reset', 'eof'], `${who}: ${JSON.stringify(cut)}`).toContain(cut?.outcome);
          expect(Number(cut?.at) - written, `${who} was cut`).toBeLessThan(WITHIN_MS);
          expect(await outcome(made[who], address), `${who} afterwards`).not.toBe('data');
        }
        for (const who of allowed) {
          expect(held.get(who)?.running, `${who} keeps the open connection`).toBe(true);
          expect(await outcome(made[who], address), `${who} afterwards`).toBe('data');
        }
      } finally {
        lab.manifests.remove(manifest);
      }
      for (const who of denied) {
        await waitFor(`${who} to be let in again`, async () => (await outcome(made[who], address)) === 'data', {
          timeoutMs: 5000,
          hint: () => processes(lab),
        });
      }
      for (const who of allowed) expect(held.get(who)?.running, `${who} at the end`).toBe(true);
    });
  }

  it('a refusal is logged with its reason and the identity of who was refused', async () => {
    const { lab, alice, server } = made;
    const [first] = cases;
    const manifest = first?.policy() as Manifest;
    lab.manifests.write(manifest);
    try {
      await waitFor('alice to be refused', async () => (await outcome(alice, server.addresses.v4)) !== 'data');
      const line = await waitFor(
        'the log line',
        () =>
          lab
            .node(2)
            .accessLog()
            .find((entry) => JSON.stringify(entry).includes('policy-denied')),
        { hint: () => processes(lab) },
      );
      expect(line).toMatchObject({ direction: 'inbound', 'src.identity': alice.identity });
    } finally {
      lab.manifests.remove(manifest);
    }
  });

  it('a broken file changes nothing: the last good state stays', async () => {
    const { lab, alice, bob, server } = made;
    const [first] = cases;
    const manifest = first?.policy() as Manifest;
    lab.manifests.write(manifest);
    try {
      await waitFor('alice to be refused', async () => (await outcome(alice, server.addresses.v4)) !== 'data');
      const broken = { ...manifest, spec: { selector, action: 'PERHAPS', rules: 'none' } };
      lab.manifests.write(broken);
      await waitFor('the controller to report the file', () => {
        const log = lab.controller?.tail(50) ?? '';
        return log.includes('authorizationpolicy-meshed-deny-alice.yaml');
      });
      expect(await outcome(alice, server.addresses.v4)).not.toBe('data');
      expect(await client(bob, 'echo', server.addresses.v4, PORT.echo)).toEqual({ ok: true });
    } finally {
      lab.manifests.remove(manifest);
    }
  });
});

/** `data` when the watch port greeted, otherwise how the client was refused. */
async function outcome(pod: Pod, address: string): Promise<string> {
  const probe = await pod.run(clientArgv('refused', address, PORT.watch, 5), { timeoutMs: 15_000 });
  return String((JSON.parse(probe.stdout) as { outcome: string }).outcome);
}
