/** What the parts of the mesh may not do on a cluster, and that uninstalling leaves the nodes as they were. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Inventory, leftSince, takeInventory } from '../../src/lab/leaks.ts';
import { waitFor } from '../../src/lab/wait.ts';
import { Cluster } from './lib/cluster.ts';
import { captured, containerPid, helm, installMesh, MESH_NAMESPACE, meshPod, podsOf } from './lib/mesh.ts';
import { namespaceObject, serverDeployment, toolsPod } from './lib/objects.ts';
import { figure, say } from './lib/report.ts';

const NS = 'shop';
let cluster: Cluster;
let before: Inventory;
const sysctls = new Map<string, string>();

beforeAll(async () => {
  cluster = await Cluster.create(say);
  await cluster.apply(namespaceObject(NS, true));
  await waitFor('the service account', async () => cluster.get('serviceaccount', 'default', NS));
  await cluster.apply(toolsPod(NS, 'one', 'node1'), serverDeployment({ namespace: NS, name: 'two', node: 'node2' }));
  await cluster.podsReady(NS, 'app=one');
  await cluster.podsReady(NS, 'app=two');
  before = await takeInventory();
  for (const node of cluster.nodes) sysctls.set(node.name, await nodeState(node.name));
  await installMesh(cluster, say);
  await captured(cluster, NS, true);
}, 420_000);

afterAll(async () => {
  await cluster?.close();
}, 60_000);

/** Files, CNI configuration, packet filter and kernel settings of a node, as text. */
async function nodeState(name: string): Promise<string> {
  const node = cluster.nodes.find((each) => each.name === name);
  const script =
    'cd / && ls -R /etc/cni /opt/cni /sys/fs/bpf 2>/dev/null; ls -A /run/ztunnel 2>/dev/null; nft list tables; ip rule; ip route show table all type local | wc -l; sysctl -a 2>/dev/null | grep -E "^net.ipv[46].conf.(all|default|lo)"';
  return (await node?.run(['sh', '-c', script]))?.stdout ?? '';
}

/** Runs a request to the API server with a token that a container of a pod holds. @returns the HTTP status */
async function requestWithToken(token: string, path: string): Promise<number> {
  const node = cluster.nodes[0];
  const { stdout } = await node.run([
    ...['curl', '-sk', '-o', '/dev/null', '-w', '%{http_code}', '-H', `Authorization: Bearer ${token}`],
    `${cluster.plane.url}${path}`,
  ]);
  return Number(stdout);
}

/** A file as a container's process sees it. */
async function fileIn(node: string, container: string, path: string): Promise<string> {
  const pid = await containerPid(cluster, await meshPod(cluster, node), container);
  return (await cluster.nodes[0].run(['cat', `/proc/${pid}/root${path}`])).stdout.trim();
}

describe('rights', () => {
  it('the proxy holds one token, which the API server does not take', async () => {
    const token = await fileIn('node1', 'proxy', '/var/run/secrets/tokens/istio-token');
    expect(token.split('.')).toHaveLength(3);
    expect(await requestWithToken(token, '/api/v1/pods')).toBe(401);
    expect(await fileIn('node1', 'proxy', '/var/run/secrets/kubernetes.io/serviceaccount/token')).toBe('');
  });

  it('the agent’s token reads pods, and neither secrets nor the certificates of others', async () => {
    const token = await fileIn('node1', 'agent', '/var/run/secrets/kubernetes.io/serviceaccount/token');
    expect(await requestWithToken(token, '/api/v1/pods?limit=1')).toBe(200);
    expect(await requestWithToken(token, `/api/v1/namespaces/${MESH_NAMESPACE}/secrets`)).toBe(403);
    expect(await requestWithToken(token, '/api/v1/secrets')).toBe(403);
    expect(await requestWithToken(token, '/api/v1/configmaps')).toBe(403);
  });

  it('both containers run without privileges that they do not need', async () => {
    for (const [container, wanted] of [
      ['agent', ['cap_net_admin', 'cap_sys_ptrace', 'cap_sys_admin', 'cap_bpf']],
      ['proxy', ['cap_net_admin', 'cap_sys_admin']],
    ] as const) {
      const pid = await containerPid(cluster, await meshPod(cluster, 'node1'), container);
      const status = (await cluster.nodes[0].run(['cat', `/proc/${pid}/status`])).stdout;
      const bits = BigInt(`0x${/CapBnd:\s*([0-9a-f]+)/.exec(status)?.[1] ?? '0'}`);
      const numbers = { cap_net_admin: 12n, cap_sys_ptrace: 19n, cap_sys_admin: 21n, cap_bpf: 39n };
      expect(bits, container).toBe(wanted.reduce((sum, name) => sum | (1n << numbers[name]), 0n));
      // 2: a filter is in force.
      expect(/Seccomp:\s*(\d)/.exec(status)?.[1], container).toBe('2');
    }
  });

  it('a pod does not see the ZDS socket', async () => {
    const { stdout } = await cluster.exec(NS, 'one', [
      'sh',
      '-c',
      'ls /var/run /run 2>&1; grep -c ztunnel /proc/net/unix',
    ]);
    expect(stdout).not.toContain('ztunnel.sock');
    const [path = ''] = (await podsOf(cluster, NS)).map(({ metadata }) => metadata.name);
    expect(path).not.toBe('');
  });
});

describe('uninstall', () => {
  it('leaves the nodes as they were: BPF, files, CNI, settings', async () => {
    const started = performance.now();
    await helm(cluster, ['uninstall', 'ebbtide', '--namespace', MESH_NAMESPACE, '--wait', '--timeout', '3m']);
    await waitFor('the pods of the mesh to be gone', async () => (await podsOf(cluster, MESH_NAMESPACE)).length === 0, {
      timeoutMs: 120_000,
      intervalMs: 500,
    });
    figure('helm uninstall to all pods gone', `${Math.round((performance.now() - started) / 1000)} s`);
    const kinds = ['BPF program', 'BPF map', 'BPF link'];
    expect(await leftSince(before, (kind) => kinds.includes(kind))).toEqual([]);
    for (const pod of await podsOf(cluster, NS)) {
      expect(pod.metadata.annotations?.['ambient.istio.io/redirection']).toBeUndefined();
    }
    for (const node of cluster.nodes) expect(await nodeState(node.name)).toBe(sysctls.get(node.name));
  }, 240_000);
});
