/** What the parts of the mesh may not do on a cluster, and that uninstalling leaves the nodes as they were. */
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Finding } from '../../src/cli/check/finding.ts';
import { type Inventory, leftSince, takeInventory } from '../../src/lab/leaks.ts';
import { waitFor } from '../../src/lab/wait.ts';
import { Cluster } from './lib/cluster.ts';
import { captured, containerPid, helm, installMesh, MESH_NAMESPACE, meshPod, podsOf } from './lib/mesh.ts';
import { namespaceObject, serverDeployment, serviceAccountObject, toolsPod, WHOAMI_PORT } from './lib/objects.ts';
import { figure, say } from './lib/report.ts';

const NS = 'shop';
/** A service account with pods on node2 alone. */
const ONLY_ON_TWO = 'only-on-two';
/** Label of nodes that the DaemonSet is for. */
const IN_MESH = 'in-mesh';
/** Where the boot guard's program is put: a folder of the node that is its own here. */
const GUARD_DIRECTORY = '/var/lib/kubelet/ebbtide/bin';
const GUARD_UNIT = '/etc/systemd/system/ebbtide-boot-guard.service';
const CHECKOUT = fileURLToPath(new URL('../..', import.meta.url));
let cluster: Cluster;
let before: Inventory;
const sysctls = new Map<string, string>();

beforeAll(async () => {
  cluster = await Cluster.create(say);
  await cluster.apply(namespaceObject(NS, true));
  await waitFor('the service account', async () => cluster.get('serviceaccount', 'default', NS));
  await cluster.kubectl(['label', 'nodes', '--all', `${IN_MESH}=yes`]);
  await cluster.apply(
    serviceAccountObject(NS, ONLY_ON_TWO),
    toolsPod(NS, 'one', 'node1'),
    serverDeployment({ namespace: NS, name: 'two', node: 'node2', serviceAccount: ONLY_ON_TWO }),
  );
  await cluster.podsReady(NS, 'app=one');
  await cluster.podsReady(NS, 'app=two');
  before = await takeInventory();
  for (const node of cluster.nodes) sysctls.set(node.name, await nodeState(node.name));
  await installMesh(cluster, say, [
    `node.nodeSelector.${IN_MESH}=yes`,
    'bootGuard.enabled=true',
    `bootGuard.execDirectory=${GUARD_DIRECTORY}`,
  ]);
  await captured(cluster, NS, true);
}, 420_000);

afterAll(async () => {
  await cluster?.close();
}, 60_000);

/** Files, CNI configuration, packet filter and kernel settings of a node, as text. */
async function nodeState(name: string): Promise<string> {
  const node = cluster.nodes.find((each) => each.name === name);
  const script =
    'cd / && find /var/lib/kubelet/ebbtide -type f 2>/dev/null; ls -RA /etc/systemd/system /etc/cni /opt/cni /sys/fs/bpf 2>/dev/null; ls -A /run/ztunnel 2>/dev/null; nft list tables; ip rule; ip route show table all type local | wc -l; sysctl -a 2>/dev/null | grep -E "^net.ipv[46].conf.(all|default|lo)"';
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

/** Asks the authority, from node1, for a certificate with a token of some node's proxy. @returns what came of it */
async function certificateFor(serviceAccount: string, token: string): Promise<string> {
  const [controller] = await podsOf(cluster, MESH_NAMESPACE, 'app.kubernetes.io/component=controller');
  const script = `
    import { Client, credentials, Metadata, status } from '@grpc/grpc-js';
    import { createCertificate } from './dist/mesh/control-plane.js';
    import { makeCsr, newKey } from './dist/proxy/certificates/csr.js';
    const { address, root, token, identity } = JSON.parse(process.argv[1]);
    const metadata = new Metadata();
    metadata.set('authorization', 'Bearer ' + token);
    metadata.set('clusterid', 'Kubernetes');
    const name = 'ebbtide-controller.${MESH_NAMESPACE}.svc';
    const client = new Client(address, credentials.createSsl(Buffer.from(root)), {
      'grpc.ssl_target_name_override': name, 'grpc.default_authority': name,
    });
    const { path, requestSerialize, responseDeserialize } = createCertificate;
    const request = {
      csr: makeCsr(identity, await newKey()),
      validityDuration: 3600,
      metadata: { fields: { ImpersonatedIdentity: { stringValue: identity } } },
    };
    const deadline = Date.now() + 10_000;
    client.makeUnaryRequest(path, requestSerialize, responseDeserialize, request, metadata, { deadline }, (error, answer) => {
      console.log(error === null ? 'signed ' + answer.certChain.length : status[error.code] + ': ' + error.details);
      client.close();
    });`;
  const question = JSON.stringify({
    address: `${controller?.status.podIP}:15012`,
    root: await fileIn('node1', 'proxy', '/var/run/secrets/istio/root-cert.pem'),
    token,
    identity: `spiffe://cluster.local/ns/${NS}/sa/${serviceAccount}`,
  });
  const command = 'cd "$1" && shift && exec "$@"';
  const node = [process.execPath, '--input-type=module', '-e', script, question];
  const { stdout, stderr } = await cluster.nodes[0].run(['sh', '-c', command, 'sh', CHECKOUT, ...node]);
  return stdout.trim() || stderr;
}

describe('rights', () => {
  it('a node gets certificates of the pods that run on it, and of no others', async () => {
    const token = (node: string): Promise<string> => fileIn(node, 'proxy', '/var/run/secrets/tokens/istio-token');
    const [one, two] = [await token('node1'), await token('node2')];
    expect(await certificateFor('default', one)).toMatch(/^signed \d/);
    expect(await certificateFor(ONLY_ON_TWO, two)).toMatch(/^signed \d/);
    const refused = await certificateFor(ONLY_ON_TWO, one);
    figure('node1 asks for the certificate of a pod on node2', refused);
    expect(refused).toMatch(/^(PERMISSION_DENIED|UNAUTHENTICATED): /);
    expect(await certificateFor('default', two)).toMatch(/^(PERMISSION_DENIED|UNAUTHENTICATED): /);
    // Nor is a token of the agent, for the API, one for certificates.
    const agent = await fileIn('node2', 'agent', '/var/run/secrets/kubernetes.io/serviceaccount/token');
    expect(await certificateFor(ONLY_ON_TWO, agent)).toMatch(/^(PERMISSION_DENIED|UNAUTHENTICATED): /);
  });

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

describe('ebbtide check', () => {
  it('says in the agent’s container that the node can run the mesh', async () => {
    const pod = await meshPod(cluster, 'node1');
    const check = ['node', 'dist/main.js', 'check', '--output', 'json'];
    const argv = ['exec', '-n', MESH_NAMESPACE, pod.metadata.name, '-c', 'agent', '--', ...check];
    const { code, stdout, stderr } = await cluster.plane.kubectl(argv);
    expect(code, `${stdout}${stderr}`).toBe(0);
    const findings = JSON.parse(stdout) as Finding[];
    expect(findings.filter(({ result }) => result === 'failed')).toEqual([]);
    const others = findings
      .filter(({ result }) => result !== 'ok')
      .map((each) => `${each.code} ${each.result}: ${each.seen}`);
    figure('ebbtide check in the agent’s container', `${findings.length} findings; ${others.join('; ') || 'all ok'}`);
  });
});

describe('the boot guard', () => {
  it('is on every node that asks for it, for the next boot', async () => {
    for (const node of cluster.nodes) {
      const unit = (await node.run(['cat', GUARD_UNIT])).stdout;
      expect(unit).toContain(`ExecStart=${GUARD_DIRECTORY}/ebbtide-boot-guard guard --node ${node.name} `);
      expect((await node.run(['sh', '-c', `ls -A /etc/systemd/system/kubelet.service.wants`])).stdout).toContain(
        'ebbtide',
      );
      // The program is the node's own: linked statically, it runs without the image.
      const said = await node.run([`${GUARD_DIRECTORY}/ebbtide-boot-guard`, 'guard', '--node', 'Not A Node']);
      expect(said, said.stderr).toMatchObject({ code: 2 });
    }
  });
});

describe('a node that the DaemonSet leaves', () => {
  it('lets its pods go, which would have no proxy any more, and captures them again when it comes back', async () => {
    const redirection = async (): Promise<string | undefined> => {
      const [pod] = await podsOf(cluster, NS, 'app=two');
      return pod?.metadata.annotations?.['ambient.istio.io/redirection'];
    };
    const ask = async (): Promise<boolean> => {
      const [pod] = await podsOf(cluster, NS, 'app=two');
      const host = pod?.status.podIP ?? '';
      const argv = ['python3', '/programs/client.py', 'whoami', host, `${WHOAMI_PORT}`];
      return (await cluster.exec(NS, 'one', argv)).code === 0;
    };
    expect(await ask()).toBe(true);
    const started = performance.now();
    await cluster.kubectl(['label', 'node', 'node2', `${IN_MESH}-`]);
    await waitFor('the pod on node2 to be let go', async () => (await redirection()) === undefined, {
      timeoutMs: 60_000,
      intervalMs: 200,
    });
    await waitFor('it to be reached in clear', ask, { timeoutMs: 30_000, intervalMs: 200 });
    figure(
      'label taken off a node to its pods reachable without the mesh',
      `${Math.round(performance.now() - started)} ms`,
    );
    expect((await cluster.nodes[1].run(['cat', GUARD_UNIT])).code).not.toBe(0);
    await cluster.kubectl(['label', 'node', 'node2', `${IN_MESH}=yes`]);
    await waitFor('it to be captured again', async () => (await redirection()) === 'enabled', {
      timeoutMs: 60_000,
      intervalMs: 200,
    });
    await waitFor('it to be reached by the mesh', ask, { timeoutMs: 30_000, intervalMs: 200 });
  }, 240_000);
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
