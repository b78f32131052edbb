/** The mesh on a real cluster: namespaces join and leave it under load, policies, probes. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { sleep, waitFor } from '../../src/lab/wait.ts';
import { Cluster } from './lib/cluster.ts';
import { loadPod, loadSince, now } from './lib/load.ts';
import { captured, installMesh, MESH_NAMESPACE, meshPod, podsOf } from './lib/mesh.ts';
import {
  denyObject,
  namespaceObject,
  peerAuthenticationObject,
  serverDeployment,
  serviceAccountObject,
  serviceObject,
  toolsPod,
  WHOAMI_PORT,
} from './lib/objects.ts';
import { figure, say } from './lib/report.ts';

const NS = 'shop';
const PLAIN = 'outside';
let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create(say);
  await installMesh(cluster, say);
  await cluster.apply(namespaceObject(NS, false), namespaceObject(PLAIN, false));
  await waitFor('the service accounts', async () => {
    await cluster.get('serviceaccount', 'default', NS);
    await cluster.get('serviceaccount', 'default', PLAIN);
    return true;
  });
  await cluster.apply(
    serviceAccountObject(NS, 'buyer'),
    serviceObject(NS, 'web'),
    serverDeployment({ namespace: NS, name: 'web', replicas: 2 }),
    loadPod({ name: 'load', namespace: NS, node: 'node1', host: 'web' }),
    toolsPod(NS, 'buyer', 'node1', 'buyer'),
    toolsPod(PLAIN, 'stranger', 'node1'),
  );
  await cluster.podsReady(NS, 'app=web');
  await cluster.podsReady(NS, 'app=load');
  await cluster.podsReady(NS, 'app=buyer');
  await cluster.podsReady(PLAIN, 'app=stranger');
  // kube-proxy takes a second or two for a Service's first endpoints, which is not to be counted as the mesh's.
  await waitFor('the load to run evenly', async () => {
    const since = now();
    await sleep(1500);
    return (await loadSince(cluster, NS, 'load', since)).slowestMs < 500;
  });
}, 420_000);

afterAll(async () => {
  await cluster?.close();
}, 60_000);

/** Asks a server who it sees. @returns what it said, or the error */
async function ask(namespace: string, pod: string, host: string): Promise<string> {
  const program = ['python3', '/programs/client.py', 'whoami', host, `${WHOAMI_PORT}`];
  const { code, stdout, stderr } = await cluster.exec(namespace, pod, program);
  return code === 0 ? stdout.trim() : `refused: ${stderr.trim().split('\n').at(-1)}`;
}

/** Access log lines of both nodes' proxies that hold a text. */
async function accessLines(text: string): Promise<string[]> {
  const lines: string[] = [];
  for (const node of ['node1', 'node2']) {
    const pod = await meshPod(cluster, node);
    const log = await cluster.kubectl(['logs', '-n', MESH_NAMESPACE, pod.metadata.name, '-c', 'proxy']);
    lines.push(...log.split('\n').filter((line) => line.includes(text)));
  }
  return lines;
}

const label = (value: string): Promise<string> =>
  cluster.kubectl(['label', 'namespace', NS, '--overwrite', `istio.io/dataplane-mode${value}`]);

describe('a namespace', () => {
  it('joins while a load runs: running pods are captured without a restart and no request fails', async () => {
    const since = now();
    const before = (await podsOf(cluster, NS)).map(({ metadata }) => metadata.uid).sort();
    await label('=ambient');
    const ms = await captured(cluster, NS, true);
    await sleep(5000);
    const figures = await loadSince(cluster, NS, 'load', since);
    figure('label to captured', `${Math.round(ms)} ms; load meanwhile: ${JSON.stringify(figures)}`);
    expect((await podsOf(cluster, NS)).map(({ metadata }) => metadata.uid).sort()).toEqual(before);
    expect(figures.failed, figures.errors).toBe(0);
    expect(figures.broken, figures.errors).toBe(0);
    expect(figures.ok).toBeGreaterThan(100);
  }, 120_000);

  it('is carried as HBONE with the identities of its service accounts; servers see the client’s address', async () => {
    const [buyer] = await podsOf(cluster, NS, 'app=buyer');
    const said = JSON.parse(await ask(NS, 'buyer', 'web')) as { peer: string };
    expect(said.peer).toBe(buyer?.status.podIP);
    await waitFor('the access log to tell of it', async () => {
      const lines = await accessLines(`spiffe://cluster.local/ns/${NS}/sa/buyer`);
      return lines.some((line) => line.includes(`spiffe://cluster.local/ns/${NS}/sa/default`));
    });
  });

  it('refuses a service account by an AuthorizationPolicy, and says in its status that it is enforced', async () => {
    await cluster.apply(denyObject(NS, 'no-buyer', `cluster.local/ns/${NS}/sa/buyer`));
    const started = performance.now();
    await waitFor('the buyer to be refused', async () => (await ask(NS, 'buyer', 'web')).startsWith('refused'));
    figure('policy written to refused (with one kubectl exec)', `${Math.round(performance.now() - started)} ms`);
    expect(await ask(PLAIN, 'stranger', `web.${NS}`)).toContain('peer');
    await waitFor('the policy to have a status', async () => {
      const policy = await cluster.get<{ status?: { conditions?: { type: string; status: string }[] } }>(
        'authorizationpolicies.security.istio.io',
        'no-buyer',
        NS,
      );
      return policy.status?.conditions?.some(({ status }) => status === 'True');
    });
    await cluster.kubectl(['delete', 'authorizationpolicy', 'no-buyer', '-n', NS]);
    await waitFor('the buyer to be let in again', async () => (await ask(NS, 'buyer', 'web')).includes('peer'));
  }, 120_000);

  it('under STRICT refuses strangers and processes of the node, while probes of the kubelet go on', async () => {
    for (const [name, probe] of Object.entries({
      'probe-tcp': { tcpSocket: { port: WHOAMI_PORT } },
      'probe-exec': { exec: { command: ['sh', '-c', ':'] } },
    })) {
      await cluster.apply(serverDeployment({ namespace: NS, name, node: 'node2', probe }));
    }
    await cluster.apply(
      serverDeployment({
        ...{ namespace: NS, name: 'probe-http', node: 'node2' },
        command: ['python3', '-m', 'http.server', `${WHOAMI_PORT}`, '--directory', '/programs'],
        probe: { httpGet: { path: '/load.py', port: WHOAMI_PORT } },
      }),
      ...(['SERVING', 'NOT_SERVING'] as const).map((health) =>
        serverDeployment({
          ...{ namespace: NS, name: `probe-grpc-${health === 'SERVING' ? 'well' : 'ill'}`, node: 'node2' },
          command: ['python3', '/programs/grpc_health.py', `${WHOAMI_PORT}`, health],
          probe: { grpc: { port: WHOAMI_PORT } },
        }),
      ),
      peerAuthenticationObject(NS, 'STRICT'),
    );
    await waitFor('the stranger to be refused', async () =>
      (await ask(PLAIN, 'stranger', `web.${NS}`)).startsWith('refused'),
    );
    expect(await ask(NS, 'buyer', 'web')).toContain('peer');
    await cluster.podsReady(NS, 'app=probe-tcp');
    await cluster.podsReady(NS, 'app=probe-exec');
    await cluster.podsReady(NS, 'app=probe-http');
    await cluster.podsReady(NS, 'app=probe-grpc-well');
    const since = now();
    await sleep(6000);
    await cluster.podsReady(NS, 'app=probe-tcp', 1000);
    await cluster.podsReady(NS, 'app=probe-http', 1000);
    await cluster.podsReady(NS, 'app=probe-grpc-well', 1000);
    // The kubelet hears what the pod says, not only that somebody listens.
    await expect(cluster.podsReady(NS, 'app=probe-grpc-ill', 1000)).rejects.toThrow('to be ready');
    const events = await cluster.kubectl(['get', 'events', '-n', NS, '--field-selector', 'reason=Unhealthy']);
    expect(events).toMatch(/probe-grpc-ill.*NOT_SERVING/);
    await cluster.podsReady(NS, 'app=web', 1000);
    const [pod] = await podsOf(cluster, NS, 'app=probe-tcp');
    const byRoot = await cluster.nodes[1].run([
      'curl',
      '-sS',
      '--max-time',
      '3',
      `telnet://${pod?.status.podIP}:${WHOAMI_PORT}`,
    ]);
    expect(byRoot.stdout).not.toContain('peer');
    const figures = await loadSince(cluster, NS, 'load', since);
    expect(figures.failed, figures.errors).toBe(0);
    await cluster.apply(peerAuthenticationObject(NS, 'PERMISSIVE'));
    const probed = ['tcp', 'exec', 'http', 'grpc-well', 'grpc-ill'].map((name) => `probe-${name}`);
    await cluster.kubectl(['delete', 'deployment', '-n', NS, ...probed]);
  }, 180_000);

  it('keeps answering through a rolling restart of the application', async () => {
    const since = now();
    await cluster.kubectl(['rollout', 'restart', '-n', NS, 'deployment/web']);
    await cluster.kubectl(['rollout', 'status', '-n', NS, 'deployment/web', '--timeout=110s']);
    await sleep(5000);
    const figures = await loadSince(cluster, NS, 'load', since);
    figure('rolling restart of the application', JSON.stringify(figures));
    expect(figures.failed, figures.errors).toBe(0);
  }, 180_000);

  it('leaves while a load runs, and no request fails', async () => {
    const since = now();
    await label('-');
    const ms = await captured(cluster, NS, false);
    await sleep(5000);
    const figures = await loadSince(cluster, NS, 'load', since);
    figure('un-label to let go', `${Math.round(ms)} ms; load meanwhile: ${JSON.stringify(figures)}`);
    expect(figures.failed, figures.errors).toBe(0);
    expect(figures.ok).toBeGreaterThan(100);
  }, 120_000);
});
