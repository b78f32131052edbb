/** A new root of trust, as the README tells an operator: nothing is restarted and no connection fails. */
import { createHash, X509Certificate } from 'node:crypto';
import { chmodSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Lab, must, type Pod, sleep, waitFor } from '../../src/lab/index.ts';
import { captured, labWith, pairLab, processes } from '../lib/mesh-lab.ts';
import { Background, client, PORT } from '../lib/peers.ts';

/** Lifetime of the certificates, and so the longest time until everybody knows of a change. */
const LIFETIME_SECONDS = 12;
const LOAD_SECONDS = 80;

const rootLab = (lab: Lab) =>
  pairLab(lab, {
    controllerArguments: ['--ttl', `${LIFETIME_SECONDS}s`],
    // Tunnels do not outlive a pause, so that new ones are made with the certificates of each step.
    proxyEnv: { SECRET_TTL: `${LIFETIME_SECONDS}s` },
  });

describe('root change', () => {
  let made: { near: Pod; server: Pod; lab: Lab };
  let pids: (number | undefined)[];
  let data: string;
  let next: { key: string; certificate: string };
  beforeAll(async () => {
    made = await labWith(rootLab);
    data = join(made.lab.ground.directory, 'data');
    next = await makeRoot(made.lab);
    pids = pidsOf(made.lab);
  });
  afterAll(() => made?.lab.close());

  it('files that cannot be used are refused with the reason, and the root in force stays', async () => {
    const { lab, near, server } = made;
    const bundle = read(data, 'root-cert.pem');
    const key = read(data, 'root-key.pem');
    const cases: { file: string; content: string; mode?: number; reason: string }[] = [
      {
        file: 'root-cert.pem',
        content: next.certificate,
        reason: 'none of its 1 certificates belongs to root-key.pem',
      },
      { file: 'root-cert.pem', content: '', reason: 'none of its 0 certificates belongs to root-key.pem' },
      {
        file: 'root-cert.pem',
        content: `${bundle}${damaged(next.certificate)}`,
        reason: 'certificate 2 cannot be read',
      },
      { file: 'root-key.pem', content: 'no key at all', reason: 'cannot be used as the root key' },
      { file: 'root-key.pem', content: next.key, reason: 'none of its 1 certificates belongs to root-key.pem' },
      { file: 'root-key.pem', content: key, mode: 0o644, reason: 'others can read the root key' },
    ];
    for (const { file, content, mode, reason } of cases) {
      const mark = logOf(lab).length;
      replace(data, file, content, mode);
      await waitFor(
        `the controller to refuse ${file}: ${reason}`,
        () =>
          logOf(lab)
            .slice(mark)
            .find((line) => line.event === 'root_refused' && String(line.reason).includes(reason)),
        { timeoutMs: 5000, hint: () => processes(lab) },
      );
      replace(data, file, file === 'root-key.pem' ? key : bundle);
      await sleep(1500);
      expect(
        logOf(lab)
          .slice(mark)
          .filter(({ event }) => event === 'root_changed'),
      ).toEqual([]);
    }
    expect(await client(near, 'echo', server.addresses.v4, PORT.echo)).toEqual({ ok: true });
  });

  it(
    'a second root is added, the key switched, the first root removed: under load no connection fails',
    async () => {
      const { lab, near, server } = made;
      const first = read(data, 'root-cert.pem');
      const load = await Background.start(near, 'load', server.addresses.v4, PORT.echo, LOAD_SECONDS);
      const began = performance.now();
      const step = async (file: string, content: string, expected: Record<string, unknown>): Promise<void> => {
        const mark = logOf(lab).length;
        replace(data, file, content);
        const line = await waitFor(
          `the controller to take ${file}`,
          () =>
            logOf(lab)
              .slice(mark)
              .find(({ event }) => event === 'root_changed'),
          { timeoutMs: 5000, hint: () => processes(lab) },
        );
        expect(line).toMatchObject(expected);
        // What the controller says is what the operator goes by.
        const settled = Date.parse(String(line.settledAt)) - Date.now();
        expect(settled).toBeLessThanOrEqual(LIFETIME_SECONDS * 1000);
        await sleep(settled);
        expect(
          logOf(lab)
            .slice(mark)
            .filter(({ event }) => event === 'root_change_abrupt'),
        ).toEqual([]);
      };
      const [old, fresh] = [fingerprint(first), fingerprint(next.certificate)];
      await step('root-cert.pem', `${first}${next.certificate}`, { signing: old, added: [fresh], removed: [] });
      expect(await rootsInUse(lab)).toEqual([old, fresh].sort());
      await step('root-key.pem', next.key, { signing: fresh, added: [], removed: [] });
      await step('root-cert.pem', next.certificate, { signing: fresh, added: [], removed: [old] });
      expect(performance.now() - began, 'the load lasts as long as the change').toBeLessThan(LOAD_SECONDS * 1000);
      expect(await load.result()).toMatchObject({ failures: {}, long_lived: true });
      expect(await rootsInUse(lab)).toEqual([fresh]);
      for (const node of lab.nodes) {
        const dump = await node.configDump();
        for (const { certChain } of dump.certificates as { certChain: { pem: string }[] }[]) {
          const leaf = new X509Certificate(Buffer.from(certChain[0]?.pem ?? '', 'base64'));
          expect(leaf.verify(new X509Certificate(next.certificate).publicKey)).toBe(true);
        }
      }
      // The controller's own certificate is of the new root as well: a proxy that starts now trusts nothing else.
      await lab.node(1).proxy?.stop();
      await lab.node(1).startProxy();
      await lab.node(1).ready();
      await captured(lab, near, server);
      pids[2] = lab.node(1).proxy?.pid;
      expect(pidsOf(lab)).toEqual(pids);
    },
    (LOAD_SECONDS + 60) * 1000,
  );

  it('a root that is exchanged at once is taken with a warning', async () => {
    const { lab } = made;
    const another = await makeRoot(lab);
    const mark = logOf(lab).length;
    // The certificate alone does not fit the key: refused. With the key it is whole.
    replace(data, 'root-cert.pem', another.certificate);
    await waitFor('the half pair to be refused', () =>
      logOf(lab)
        .slice(mark)
        .find((line) => line.event === 'root_refused'),
    );
    replace(data, 'root-key.pem', another.key);
    await waitFor(
      'the warning',
      () =>
        logOf(lab)
          .slice(mark)
          .find(({ event }) => event === 'root_change_abrupt'),
      { hint: () => processes(lab) },
    );
    // It is a matter of one lifetime, and no restart, until everybody has a certificate of the new root.
    await sleep(LIFETIME_SECONDS * 1000);
    await captured(lab, made.near, made.server);
    expect(await rootsInUse(lab)).toEqual([fingerprint(another.certificate)]);
  });
});

const read = (directory: string, name: string): string => readFileSync(join(directory, name), 'utf8');

/** As an operator does it: written beside, then renamed. */
function replace(
  directory: string,
  name: string,
  content: string,
  mode = name === 'root-key.pem' ? 0o600 : 0o644,
): void {
  const staged = join(directory, `.${name}.new`);
  writeFileSync(staged, content);
  chmodSync(staged, mode);
  renameSync(staged, join(directory, name));
}

/** A root made by the commands of the README, with the name that the first one has: only their keys tell them apart. */
async function makeRoot(lab: Lab): Promise<{ key: string; certificate: string }> {
  const directory = join(lab.ground.directory, 'tmp');
  const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
  const command = /^openssl req [\s\S]*?[^\\]\n/m.exec(readme)?.[0] ?? '';
  expect(command).toContain('new-key.pem');
  await must(['bash', '-e', '-c', `cd ${directory}\n${command}`]);
  return { key: read(directory, 'new-key.pem'), certificate: read(directory, 'new-cert.pem') };
}

/** Something between the armour that is no certificate. */
function damaged(pem: string): string {
  const lines = pem.trim().split('\n');
  return `${[lines[0], createHash('sha256').update(pem).digest('base64'), lines.at(-1)].join('\n')}\n`;
}

const fingerprint = (pem: string): string => new X509Certificate(pem).fingerprint256;

function logOf(lab: Lab): Record<string, unknown>[] {
  const text = readFileSync(lab.controller?.log ?? '', 'utf8');
  return text
    .split('\n')
    .flatMap((line) => (line.startsWith('{') ? [JSON.parse(line) as Record<string, unknown>] : []));
}

/** Fingerprints of all roots that any workload of either node trusts. */
async function rootsInUse(lab: Lab): Promise<string[]> {
  const dumps = await Promise.all(lab.nodes.map((node) => node.configDump()));
  const roots = dumps.flatMap((dump) =>
    (dump.certificates as { rootCerts: { pem: string }[] }[]).flatMap(({ rootCerts }) =>
      rootCerts.map(({ pem }) => fingerprint(Buffer.from(pem, 'base64').toString())),
    ),
  );
  return [...new Set(roots)].sort();
}

/** Processes of the mesh, none of which is to be another one afterwards. */
function pidsOf(lab: Lab): (number | undefined)[] {
  return [
    lab.controller?.pid,
    lab.node(1).agent?.pid,
    lab.node(1).proxy?.pid,
    lab.node(2).agent?.pid,
    lab.node(2).proxy?.pid,
  ];
}
