/** Which endpoint of a Service a connection gets, and what happens when that one is dead. */
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Lab, LabProcess, type Manifest, must, type Pod, placed, waitFor } from '../../src/lab/index.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { client, clientArgv, PORT, startServer } from '../lib/peers.ts';

const TIMES = 30;
const SERVER = fileURLToPath(new URL('../lib/programs/server.py', import.meta.url));
/** The lab's pods have their addresses in 10.244; the nodes' are of nobody in the mesh. */
const FOREIGN = '172.30.0.2';

async function endpointsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const from = await lab.pod({ name: 'client', namespace: 'meshed', node: 1 });
  const near = await lab.pod({ name: 'near', namespace: 'meshed', node: 1 });
  const far = await lab.pod({ name: 'far', namespace: 'meshed', node: 2 });
  // No program listens in these.
  const dead = await lab.pod({ name: 'dead', namespace: 'meshed', node: 2 });
  const deadPlain = await lab.pod({ name: 'dead', namespace: 'plain', node: 2 });
  const plain = await lab.pod({ name: 'live', namespace: 'plain', node: 2 });
  for (const pod of [near, far, plain]) await startServer(pod);
  const silent = await lab.pod({ name: 'silent', namespace: 'plain', node: 2 });
  await must(placed(silent.place, ['nft', 'add table ip silent']));
  await must(
    placed(silent.place, ['nft', 'add chain ip silent input { type filter hook input priority 0; policy drop; }']),
  );
  const node2 = { netns: lab.ground.netnsPath('node2'), cgroup: lab.ground.subgroup('tools') };
  const log = `${lab.ground.directory}/logs/foreign.log`;
  await LabProcess.start('foreign server', node2, ['python3', SERVER], { log });
  await waitFor('the foreign server to listen', async () => {
    return (await must(placed(node2, ['ss', '-Hltn', `sport = :${PORT.stall}`]))) !== '';
  });
  for (const [node, zone] of [
    [1, 'a'],
    [2, 'b'],
  ] as const) {
    const labels = { 'topology.kubernetes.io/region': 'r', 'topology.kubernetes.io/zone': zone };
    const address = `172.30.0.${node}`;
    lab.manifests.write({
      apiVersion: 'v1',
      kind: 'Node',
      metadata: { name: `node${node}`, labels },
      status: { addresses: [{ type: 'InternalIP', address }] },
    });
  }
  await lab.startMesh();
  for (const pod of [near, far]) await captured(lab, from, pod);
  return { from, near, far, dead, deadPlain, plain, silent };
}

type Made = Awaited<ReturnType<typeof endpointsLab>> & { lab: Lab };
let services = 200;

describe('endpoints', () => {
  let made: Made;
  beforeAll(async () => {
    made = await labWith(endpointsLab);
  });
  afterAll(() => made?.lab.close());

  /** Writes a Service without selector and its slice; resolves with its address when the client's proxy has both. */
  async function sliced(
    name: string,
    endpoints: readonly Record<string, unknown>[],
    spec: Record<string, unknown> = {},
    namespace = 'meshed',
  ): Promise<{ address: string; write: (endpoints: readonly Record<string, unknown>[]) => Promise<void> }> {
    const address = `10.96.0.${services++}`;
    const service: Manifest = {
      apiVersion: 'v1',
      kind: 'Service',
      metadata: { name, namespace },
      spec: {
        clusterIP: address,
        clusterIPs: [address],
        ports: [{ name: 'tcp-who', protocol: 'TCP', port: 80, targetPort: 1 }],
        ...spec,
      },
    };
    const write = async (listed: readonly Record<string, unknown>[]) => {
      made.lab.manifests.write({
        apiVersion: 'discovery.k8s.io/v1',
        kind: 'EndpointSlice',
        metadata: { name: `${name}-1`, namespace, labels: { 'kubernetes.io/service-name': name } },
        addressType: 'IPv4',
        ports: [{ name: 'tcp-who', protocol: 'TCP', port: PORT.whoami }],
        endpoints: listed,
      });
      await known(name, listed.length);
    };
    made.lab.manifests.write(service);
    await write(endpoints);
    return { address, write };
  }

  /** Resolves when the client's proxy knows so many endpoints of a Service. */
  const known = (name: string, count: number) =>
    waitFor(`the Service ${name} with ${count} endpoints`, async () => (await endpointsOf(name))?.length === count, {
      hint: () => processes(made.lab),
    });
  async function endpointsOf(name: string): Promise<{ workloadUid: string; status: string }[] | undefined> {
    const dump = await made.lab.node(1).configDump();
    const list = dump.services as {
      name: string;
      endpoints: Record<string, { workloadUid: string; status: string }>;
    }[];
    const service = list.find((each) => each.name === name);
    return service === undefined ? undefined : Object.values(service.endpoints);
  }
  const pod = (of: Pod) => ({
    addresses: [of.addresses.v4],
    targetRef: { kind: 'Pod', name: of.name, namespace: of.namespace },
    nodeName: `node${of.node}`,
  });
  const spread = async (address: string, times = TIMES) =>
    (await client(made.from, 'spread', address, 80, times)) as {
      servers: Record<string, number>;
      failures: Record<string, number>;
    };
  const ready = async (of: Pod, status: 'True' | 'False') => {
    const conditions = [{ type: 'Ready', status }];
    const before = of.manifest['status'] as Record<string, unknown>;
    made.lab.manifests.write({ ...of.manifest, status: { ...before, conditions } });
    const wanted = status === 'True' ? 'Healthy' : 'Unhealthy';
    await waitFor(`${of.id} to be ${wanted}`, async () => {
      const dump = await made.lab.node(1).configDump();
      const workloads = dump.workloads as { name: string; namespace: string; status: string }[];
      return workloads.find(({ name, namespace }) => name === of.name && namespace === of.namespace)?.status === wanted;
    });
  };

  it('a selector-less Service reaches the pods that its slice names, with their identities', async () => {
    const { near, far, lab } = made;
    const { address } = await sliced('by-reference', [pod(near), pod(far)]);
    const said = await spread(address);
    expect(said.failures).toEqual({});
    expect(Object.keys(said.servers).sort()).toEqual([near.addresses.v4, far.addresses.v4].sort());
    const service = 'by-reference.meshed.svc.cluster.local';
    const lines = await waitFor('the log lines', () => {
      const found = lab
        .node(1)
        .accessLog()
        .filter((line) => line.direction === 'outbound' && line['dst.service'] === service);
      return found.length >= TIMES && found;
    });
    expect(new Set(lines.map((line) => line['dst.identity']))).toEqual(new Set([near.identity, far.identity]));
  });

  it('a slice with a foreign address, which is no pod, is reached in plaintext', async () => {
    const { address } = await sliced('foreign', [{ addresses: [FOREIGN] }]);
    const said = await spread(address, 5);
    expect(said).toEqual({ failures: {}, servers: { [FOREIGN]: 5 } });
  });

  it('a slice whose endpoint is not ready has none that is reached', async () => {
    const { far } = made;
    const { address } = await sliced('slice-not-ready', [
      { addresses: [FOREIGN], conditions: { ready: false } },
      pod(far),
    ]);
    expect(await spread(address)).toEqual({ failures: {}, servers: { [far.addresses.v4]: TIMES } });
  });

  for (const [what, deadOne] of [
    ['a captured pod in which nothing listens', () => pod(made.dead)],
    ['a plain pod in which nothing listens', () => pod(made.deadPlain)],
  ] as const) {
    it(`${what} behind a Service costs no connection: another endpoint is tried before any byte was sent`, async () => {
      const { far, lab } = made;
      const name = `half-dead-${services}`;
      const { address } = await sliced(name, [deadOne(), pod(far)]);
      const mark = lab.node(2).accessLog().length;
      const said = await spread(address, 20);
      expect(said).toEqual({ failures: {}, servers: { [far.addresses.v4]: 20 } });
      if (what.startsWith('a captured')) {
        // The dead one was tried: its own proxy says so.
        await waitFor('the refusal by the dead pod', () =>
          lab
            .node(2)
            .accessLog()
            .slice(mark)
            .some(
              (line) =>
                line['dst.addr'] === `${made.dead.addresses.v4}:${PORT.whoami}` && line.reason === 'connect-refused',
            ),
        );
      }
    });
  }

  it('an endpoint that never answers is left after the connect timeout, and the connection is made elsewhere', async () => {
    const { far, silent } = made;
    const { address } = await sliced('half-silent', [pod(silent), pod(far)]);
    const started = performance.now();
    // All at once, since each that gets the silent one waits.
    const said = await Promise.all(Array.from({ length: 12 }, () => spread(address, 1)));
    for (const each of said) expect(each).toEqual({ failures: {}, servers: { [far.addresses.v4]: 1 } });
    expect(performance.now() - started, 'one at least had the silent one first').toBeGreaterThan(9000);
  });

  it('after a dead captured pod, a plain one is reached in plaintext and said to be', async () => {
    const { plain, dead, lab } = made;
    const { address } = await sliced('mixed', [pod(dead), pod(plain)]);
    expect(await spread(address, 20)).toEqual({ failures: {}, servers: { [plain.addresses.v4]: 20 } });
    const lines = await waitFor('the log lines', () => {
      const service = 'mixed.meshed.svc.cluster.local';
      const found = lab
        .node(1)
        .accessLog()
        .filter((line) => line['dst.service'] === service);
      return found.length >= 20 && found;
    });
    for (const line of lines) {
      expect(line).not.toHaveProperty('dst.identity');
      expect(line).not.toHaveProperty('dst.hbone_addr');
    }
  });

  it('with nothing but dead endpoints the client is told promptly', async () => {
    const { address } = await sliced('all-dead', [pod(made.dead), pod(made.deadPlain)]);
    const probe = await made.from.run(clientArgv('refused', address, 80, 10), { timeoutMs: 15_000 });
    const said = JSON.parse(probe.stdout) as { outcome: string; ms: number };
    expect(['ConnectionResetError', 'ConnectionRefusedError']).toContain(said.outcome);
    expect(said.ms).toBeLessThan(2000);
  });

  it('a refusal by policy is final: no other endpoint is asked instead', async () => {
    const { near, far, lab } = made;
    const { address } = await sliced('denied', [pod(near), pod(far)]);
    const policy: Manifest = {
      apiVersion: 'security.istio.io/v1',
      kind: 'AuthorizationPolicy',
      metadata: { name: 'far', namespace: 'meshed' },
      spec: { selector: { matchLabels: { app: 'far' } }, action: 'DENY', rules: [{}] },
    };
    lab.manifests.write(policy);
    try {
      await waitFor('the policy', async () => {
        const probe = await made.from.run(clientArgv('refused', far.addresses.v4, PORT.whoami, 5));
        return (JSON.parse(probe.stdout) as { outcome: string }).outcome !== 'data';
      });
      const said = await spread(address);
      const failed = Object.values(said.failures).reduce((sum, count) => sum + count, 0);
      expect(Object.keys(said.servers)).toEqual([near.addresses.v4]);
      expect(failed).toBeGreaterThan(0);
      expect(failed + (said.servers[near.addresses.v4] ?? 0)).toBe(TIMES);
    } finally {
      lab.manifests.remove(policy);
    }
  });

  it('a pod that is not ready gets nothing, unless the Service publishes such', async () => {
    const { near, far } = made;
    const selecting = await sliced('ready', [pod(near), pod(far)]);
    const publishing = await sliced('unready-too', [pod(near), pod(far)], { publishNotReadyAddresses: true });
    await ready(near, 'False');
    expect(await spread(selecting.address)).toEqual({ failures: {}, servers: { [far.addresses.v4]: TIMES } });
    const both = await spread(publishing.address);
    expect(Object.keys(both.servers).sort()).toEqual([near.addresses.v4, far.addresses.v4].sort());
    await ready(near, 'True');
    expect(Object.keys((await spread(selecting.address)).servers).length).toBe(2);
  });

  it('PreferClose stays in the zone, and leaves it when nothing there is ready', async () => {
    const { near, far } = made;
    const { address } = await sliced('close', [pod(near), pod(far)], { trafficDistribution: 'PreferClose' });
    expect(await spread(address)).toEqual({ failures: {}, servers: { [near.addresses.v4]: TIMES } });
    await ready(near, 'False');
    expect(await spread(address)).toEqual({ failures: {}, servers: { [far.addresses.v4]: TIMES } });
    await ready(near, 'True');
    expect(await spread(address)).toEqual({ failures: {}, servers: { [near.addresses.v4]: TIMES } });
  });

  it('PreferClose leaves the zone, too, when the one that is there is dead', async () => {
    const { far, deadPlain, lab } = made;
    // A dead pod of the client's own zone: its node is said to be the client's.
    const manifest = { ...deadPlain.manifest, spec: { ...(deadPlain.manifest['spec'] as object), nodeName: 'node1' } };
    lab.manifests.write(manifest);
    try {
      const { address } = await sliced('close-dead', [pod(deadPlain), pod(far)], {
        trafficDistribution: 'PreferClose',
      });
      expect(await spread(address)).toEqual({ failures: {}, servers: { [far.addresses.v4]: TIMES } });
    } finally {
      lab.manifests.write(deadPlain.manifest);
    }
  });

  it('internalTrafficPolicy Local stays on the node, and refuses rather than leave it', async () => {
    const { near, far, lab } = made;
    const { address, write } = await sliced('local', [pod(near), pod(far)], { internalTrafficPolicy: 'Local' });
    expect(await spread(address)).toEqual({ failures: {}, servers: { [near.addresses.v4]: TIMES } });
    await write([pod(far)]);
    const said = await spread(address, 3);
    expect(said.servers).toEqual({});
    await waitFor('the reason', () =>
      lab
        .node(1)
        .accessLog()
        .some((line) => line.reason === 'no-healthy-endpoint' && String(line['dst.addr']).startsWith(`${address}:`)),
    );
  });

  it('headless: each pod is reached by its own address, and a dead one is not replaced by another', async () => {
    const { near, far, dead, from, lab } = made;
    const ports = [{ port: PORT.whoami, targetPort: PORT.whoami }];
    await lab.service({ name: 'headless', namespace: 'meshed', pods: [near], ports, headless: true, selector: {} });
    for (const each of [near, far]) {
      const said = (await client(from, 'spread', each.addresses.v4, PORT.whoami, 5)) as Record<string, unknown>;
      expect(said).toEqual({ failures: {}, servers: { [each.addresses.v4]: 5 } });
    }
    const probe = await from.run(clientArgv('refused', dead.addresses.v4, PORT.whoami, 10));
    const said = JSON.parse(probe.stdout) as { outcome: string };
    expect(['ConnectionResetError', 'ConnectionRefusedError']).toContain(said.outcome);
  });

  it('the last endpoint is taken away: connections are refused with the reason, and pass again when it is back', async () => {
    const { plain, lab } = made;
    const { address, write } = await sliced('emptied', [pod(plain)]);
    expect((await spread(address, 3)).servers).toEqual({ [plain.addresses.v4]: 3 });
    await write([]);
    expect((await spread(address, 3)).servers).toEqual({});
    const line = await waitFor('the reason', () =>
      lab
        .node(1)
        .accessLog()
        .find((each) => each.reason === 'no-healthy-endpoint' && String(each['dst.addr']).startsWith(`${address}:`)),
    );
    expect(String(line.hint)).toContain('no usable endpoint');
    await write([pod(plain)]);
    expect((await spread(address, 3)).servers).toEqual({ [plain.addresses.v4]: 3 });
  });
});
