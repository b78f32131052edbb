/** Parts of the mesh and of the cluster restart under load: what fails meanwhile, and for how long. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { analyseCapture } from '../../src/lab/pcap.ts';
import { sleep, waitFor } from '../../src/lab/wait.ts';
import { WireRecording } from '../../src/lab/wire.ts';
import { Cluster } from './lib/cluster.ts';
import { type LoadFigures, loadLines, loadPod, loadSince, now } from './lib/load.ts';
import { captured, containerPid, installMesh, MESH_NAMESPACE, meshPod } from './lib/mesh.ts';
import { ECHO_PORT, namespaceObject, serverDeployment, serviceObject, WHOAMI_PORT } from './lib/objects.ts';
import { figure, say } from './lib/report.ts';

const NS = 'shop';
let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create(say);
  await installMesh(cluster, say);
  await cluster.apply(namespaceObject(NS, true));
  await waitFor('the service account', async () => cluster.get('serviceaccount', 'default', NS));
  await cluster.apply(
    serviceObject(NS, 'web'),
    serverDeployment({ namespace: NS, name: 'web', replicas: 2, node: 'node2' }),
    loadPod({ name: 'load', namespace: NS, node: 'node1', host: 'web' }),
  );
  await cluster.podsReady(NS, 'app=web');
  await cluster.podsReady(NS, 'app=load');
  await captured(cluster, NS, true);
  await sleep(2000);
}, 420_000);

afterAll(async () => {
  await cluster?.close();
}, 60_000);

/** Does something while the load runs, waits a little, and says what the load saw. */
async function underLoad(what: string, act: () => Promise<void>): Promise<LoadFigures> {
  await waitFor('the load to run', async () => (await loadSince(cluster, NS, 'load', now() - 2)).ok > 0);
  const since = now();
  await act();
  await sleep(5000);
  const figures = await loadSince(cluster, NS, 'load', since);
  figure(what, JSON.stringify(figures));
  expect(figures.ok).toBeGreaterThan(50);
  return figures;
}

/** Kills a container's process and waits until kubelet has started it again and it is ready. */
async function killContainer(node: string, container: string): Promise<void> {
  const pod = await meshPod(cluster, node);
  const before = pod.status.containerStatuses?.find(({ name }) => name === container)?.restartCount ?? 0;
  process.kill(await containerPid(cluster, pod, container), 'SIGKILL');
  await waitFor(
    `${container} on ${node} to be started again`,
    async () => {
      const now = await meshPod(cluster, node);
      const status = now.status.containerStatuses?.find(({ name }) => name === container);
      return (status?.restartCount ?? 0) > before && (status as { ready?: boolean }).ready === true;
    },
    { timeoutMs: 90_000, intervalMs: 200 },
  );
}

describe('under load', () => {
  it('killed agents change nothing', async () => {
    const figures = await underLoad('both agents killed with -9', async () => {
      await killContainer('node1', 'agent');
      await killContainer('node2', 'agent');
    });
    expect(figures.failed, figures.errors).toBe(0);
    expect(figures.broken, figures.errors).toBe(0);
  }, 180_000);

  it('a restart of all controllers changes nothing', async () => {
    const figures = await underLoad('controllers restarted', async () => {
      await cluster.kubectl(['rollout', 'restart', '-n', MESH_NAMESPACE, 'deployment/ebbtide-controller']);
      await cluster.kubectl([
        'rollout',
        'status',
        '-n',
        MESH_NAMESPACE,
        'deployment/ebbtide-controller',
        '--timeout=110s',
      ]);
    });
    expect(figures.failed, figures.errors).toBe(0);
    expect(figures.broken, figures.errors).toBe(0);
  }, 180_000);

  it('a killed API server changes nothing', async () => {
    const figures = await underLoad('API server killed, back after 5 s', async () => {
      await cluster.plane.killApiServer();
      await sleep(5000);
      await cluster.plane.startApiServer();
      await cluster.podsReady(MESH_NAMESPACE, 'app.kubernetes.io/component=node');
    });
    expect(figures.failed, figures.errors).toBe(0);
    expect(figures.broken, figures.errors).toBe(0);
  }, 180_000);

  it('a rolling restart of the DaemonSet fails no new connection', async () => {
    const figures = await underLoad('kubectl rollout restart daemonset', async () => {
      await cluster.kubectl(['rollout', 'restart', '-n', MESH_NAMESPACE, 'daemonset/ebbtide-node']);
      await cluster.kubectl(['rollout', 'status', '-n', MESH_NAMESPACE, 'daemonset/ebbtide-node', '--timeout=230s']);
    });
    figure('held connections broken by the rolling restart', `${figures.broken}`);
    expect(figures.failed, figures.errors).toBe(0);
  }, 300_000);

  it('a killed proxy is back soon, and held connections break rather than hang', async () => {
    const since = now();
    await killContainer('node1', 'proxy');
    await sleep(3000);
    const lines = (await loadLines(cluster, NS, 'load')).filter(({ at }) => at > since);
    // The time in which no request succeeded, as the load's own lines tell.
    let longest = 0;
    let last = lines[0];
    for (const line of lines) {
      if (last !== undefined && line.ok > last.ok) {
        longest = Math.max(longest, line.at - last.at);
        last = line;
      }
    }
    const figures = await loadSince(cluster, NS, 'load', since);
    figure(
      'proxy killed with -9',
      `${longest.toFixed(1)} s until requests succeeded again; ${JSON.stringify(figures)}`,
    );
    expect(longest).toBeLessThan(30);
    const healed = await underLoad('after the killed proxy is back', async () => {});
    expect(healed.failed, healed.errors).toBe(0);
  }, 180_000);

  it('a node whose pod of the mesh is torn away heals by itself, and nothing was let through meanwhile', async () => {
    const wire = await WireRecording.start(cluster.ground, 'torn');
    const since = now();
    const torn = await meshPod(cluster, 'node1');
    await cluster.kubectl(['delete', 'pod', '-n', MESH_NAMESPACE, torn.metadata.name, '--force', '--grace-period=0']);
    const started = performance.now();
    await waitFor(
      'another pod of the mesh to be ready on node1',
      async () => {
        const pod = await meshPod(cluster, 'node1');
        const statuses = (pod.status.containerStatuses ?? []) as readonly { ready?: boolean }[];
        const ready = statuses.length === 2 && statuses.every((status) => status.ready === true);
        return pod.metadata.uid !== torn.metadata.uid && ready;
      },
      { timeoutMs: 120_000, intervalMs: 300 },
    );
    figure('pod of the mesh torn away, until the next one is ready', `${Math.round(performance.now() - started)} ms`);
    figure('load meanwhile', JSON.stringify(await loadSince(cluster, NS, 'load', since)));
    const healed = await underLoad('after it', async () => sleep(2000));
    expect(healed.failed, healed.errors).toBe(0);
    // What the server says to everyone; and whatever else passed between pods was TLS.
    const report = analyseCapture(await wire.stop(), ['peername']);
    expect(report.markersFound).toEqual([]);
    const carried = report.connections.filter(({ payloadBytes }) => payloadBytes > 0);
    expect(carried.filter(({ serverPort }) => serverPort === 15008).length).toBeGreaterThan(0);
    expect(carried.filter(({ serverPort }) => serverPort === WHOAMI_PORT || serverPort === ECHO_PORT)).toEqual([]);
  }, 240_000);

  it('a drained node takes its pods along without a failed request', async () => {
    const figures = await underLoad('node drained', async () => {
      await cluster.apply(serverDeployment({ namespace: NS, name: 'web', replicas: 2 }));
      await cluster.kubectl(['rollout', 'status', '-n', NS, 'deployment/web', '--timeout=110s']);
      await cluster.kubectl(['drain', 'node2', '--ignore-daemonsets', '--delete-emptydir-data', '--timeout=110s']);
      await cluster.podsReady(NS, 'app=web');
    });
    await cluster.kubectl(['uncordon', 'node2']);
    expect(figures.failed, figures.errors).toBe(0);
  }, 300_000);
});
