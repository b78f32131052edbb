/** Pods that begin and end: captured before their first packet and before the first packet to them; bursts leave nothing. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { takeInventory } from '../../src/lab/leaks.ts';
import { analyseCapture } from '../../src/lab/pcap.ts';
import { sleep, waitFor } from '../../src/lab/wait.ts';
import { WireRecording } from '../../src/lab/wire.ts';
import { Cluster } from './lib/cluster.ts';
import { TOOLS_IMAGE } from './lib/images.ts';
import { captured, containerPid, installMesh, meshPod, podsOf } from './lib/mesh.ts';
import { SLOW_POD, SLOW_SECONDS } from './lib/node.ts';
import { namespaceObject, peerAuthenticationObject, serverDeployment, toolsPod, WHOAMI_PORT } from './lib/objects.ts';
import { figure, say } from './lib/report.ts';

const NS = 'shop';
const PLAIN = 'outside';
const MARKER = 'first-bytes-in-clear';
const HAMMER = 'hammered-in-clear';
let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create(say);
  await installMesh(cluster, say);
  await cluster.apply(namespaceObject(NS, true), namespaceObject(PLAIN, false));
  for (const namespace of [NS, PLAIN]) {
    await waitFor('the service account', async () => cluster.get('serviceaccount', 'default', namespace));
  }
  await cluster.apply(
    serverDeployment({ namespace: NS, name: 'web', node: 'node2' }),
    toolsPod(PLAIN, 'stranger', 'node1'),
  );
  await cluster.podsReady(NS, 'app=web');
  await cluster.podsReady(PLAIN, 'app=stranger');
  await captured(cluster, NS, true);
}, 420_000);

afterAll(async () => {
  await cluster?.close();
}, 60_000);

/** A pod that connects with its first instruction. */
function firstPod(namespace: string, name: string, address: string, text: string): object {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { namespace, name, labels: { app: name } },
    spec: {
      nodeName: 'node1',
      terminationGracePeriodSeconds: 1,
      containers: [
        {
          name: 'first',
          image: TOOLS_IMAGE,
          imagePullPolicy: 'Never',
          command: ['/programs/first', address, `${WHOAMI_PORT + 1}`, text],
        },
      ],
    },
  };
}

async function addressOf(namespace: string, selector: string): Promise<string> {
  const [pod] = await podsOf(cluster, namespace, selector);
  return pod?.status.podIP ?? '';
}

/** The addresses that the node's pods get next: the one after the last, by the record of CNI's host-local. */
function nextAddresses(count: number): string[] {
  const record = join(cluster.nodes[0].options.directory, 'addresses/lab/last_reserved_ip.0');
  const last = Number(readFileSync(record, 'utf8').trim().split('.')[3]);
  return Array.from({ length: count }, (_, i) => `10.244.1.${last + 1 + i}`);
}

describe('a new pod of a namespace in the mesh', () => {
  it('is captured before its first packet, ten times out of ten', async () => {
    const wire = await WireRecording.start(cluster.ground, 'first');
    const server = await addressOf(NS, 'app=web');
    const said: string[] = [];
    for (let n = 0; n < 10; n++) {
      await cluster.apply(firstPod(NS, `first-${n}`, server, MARKER));
      await waitFor(
        `first-${n} to connect`,
        async () => {
          const log = await cluster.plane.kubectl(['logs', '-n', NS, `first-${n}`]);
          if (!log.stdout.includes('connected')) return false;
          said.push(log.stdout.trim().replaceAll('\n', ' | '));
          return true;
        },
        { timeoutMs: 60_000, intervalMs: 300 },
      );
    }
    const report = analyseCapture(await wire.stop(), [MARKER]);
    for (const line of said) figure('first instruction of a pod', line);
    expect(report.markersFound).toEqual([]);
    // Theirs alone: proxies speak to the controller all the while, by connections older than the recording.
    const firsts = (await podsOf(cluster, NS)).filter(({ metadata }) => metadata.name.startsWith('first-'));
    expect(firsts).toHaveLength(10);
    const own = report.connections.filter(({ client }) =>
      firsts.some(({ status }) => client.startsWith(`${status.podIP}:`)),
    );
    expect(own.filter(({ protocol }) => protocol === 'tls1.3').length).toBeGreaterThanOrEqual(10);
    expect(own.filter(({ protocol, payloadBytes }) => protocol !== 'tls1.3' && payloadBytes > 0)).toEqual([]);
    await cluster.kubectl(['delete', 'pods', '-n', NS, ...said.map((_, n) => `first-${n}`)]);
  }, 300_000);

  it('is captured before the first packet to it, under STRICT, while a stranger hammers its address', async () => {
    await cluster.apply(peerAuthenticationObject(NS, 'STRICT'));
    await sleep(2000);
    const server = await addressOf(NS, 'app=web');
    const addresses = nextAddresses(3);
    const hammer = `
import socket, sys, threading, time
end = time.time() + 25
def hammer(host):
    while time.time() < end:
        try:
            with socket.create_connection((host, ${WHOAMI_PORT}), 0.05) as c:
                c.sendall(b"${HAMMER}")
        except OSError:
            pass
        time.sleep(0.001)
threads = [threading.Thread(target=hammer, args=(h,)) for h in sys.argv[1:] for _ in range(2)]
[t.start() for t in threads]; [t.join() for t in threads]`;
    const hammering = cluster.exec(PLAIN, 'stranger', ['python3', '-c', hammer, ...addresses]);
    await sleep(3000);
    for (let n = 0; n < 3; n++) await cluster.apply(firstPod(NS, `hit-${n}`, server, MARKER));
    await cluster.podsReady(NS, 'app=hit-2');
    const { code } = await hammering;
    expect(code).toBe(0);
    const stranger = await addressOf(PLAIN, 'app=stranger');
    let hits = 0;
    for (let n = 0; n < 3; n++) {
      const log = await cluster.kubectl(['logs', '-n', NS, `hit-${n}`]);
      figure('a pod that was hammered from before it existed', log.trim().replaceAll('\n', ' | '));
      expect(log).toContain('listens');
      expect(log).not.toContain(`accepted ${stranger}`);
      if (addresses.includes(await addressOf(NS, `app=hit-${n}`))) hits++;
    }
    // Otherwise nobody hammered them, and nothing was shown.
    expect(hits).toBeGreaterThan(0);
    await cluster.apply(peerAuthenticationObject(NS, 'PERMISSIVE'));
    await cluster.kubectl(['delete', 'pods', '-n', NS, 'hit-0', 'hit-1', 'hit-2']);
  }, 240_000);

  it('whose network comes late is captured before its first packet all the same', async () => {
    const wire = await WireRecording.start(cluster.ground, 'slow');
    const server = await addressOf(NS, 'app=web');
    const started = performance.now();
    await cluster.apply(firstPod(NS, SLOW_POD, server, MARKER));
    let log = '';
    await waitFor('the slow pod to connect', async () => {
      log = (await cluster.plane.kubectl(['logs', '-n', NS, SLOW_POD])).stdout;
      return log.includes('connected');
    });
    const ms = performance.now() - started;
    const report = analyseCapture(await wire.stop(), [MARKER]);
    figure('a pod whose network comes late', `${Math.round(ms)} ms | ${log.trim().replaceAll('\n', ' | ')}`);
    expect(ms).toBeGreaterThan(2 * SLOW_SECONDS * 1000);
    expect(report.markersFound).toEqual([]);
    await cluster.kubectl(['delete', 'pod', '-n', NS, SLOW_POD]);
  }, 120_000);

  it('of another namespace is not held up', async () => {
    const server = await addressOf(NS, 'app=web');
    await cluster.apply(firstPod(PLAIN, 'free', server, MARKER));
    await waitFor('the pod to connect', async () => {
      return (await cluster.plane.kubectl(['logs', '-n', PLAIN, 'free'])).stdout.includes('connected');
    });
    const log = await cluster.kubectl(['logs', '-n', PLAIN, 'free']);
    figure('first instruction of a pod outside the mesh', log.trim().replaceAll('\n', ' | '));
    await cluster.kubectl(['delete', 'pod', '-n', PLAIN, 'free']);
  }, 120_000);
});

describe('200 pods that come and go', () => {
  it('leave no map entry, link, descriptor or memory behind', async () => {
    const round = async (name: string): Promise<void> => {
      const deployment = serverDeployment({ namespace: NS, name, replicas: 200 }) as {
        spec: { template: { spec: { containers: Record<string, unknown>[] } } };
      };
      const [container] = deployment.spec.template.spec.containers;
      if (container === undefined) throw new Error('no container');
      container.command = ['sleep', 'infinity'];
      container.readinessProbe = undefined;
      container.lifecycle = undefined;
      await cluster.apply(JSON.parse(JSON.stringify(deployment)) as object);
      const started = performance.now();
      await waitFor(
        '200 pods to be captured',
        async () => {
          const pods = await podsOf(cluster, NS, `app=${name}`);
          const enabled = pods.filter(
            ({ metadata }) => metadata.annotations?.['ambient.istio.io/redirection'] === 'enabled',
          );
          return enabled.length === 200;
        },
        { timeoutMs: 240_000, intervalMs: 1000 },
      );
      figure('200 pods created to all captured', `${Math.round((performance.now() - started) / 1000)} s`);
      await cluster.kubectl(['delete', 'deployment', '-n', NS, name, '--wait=true', '--cascade=foreground']);
      await waitFor('200 pods to be gone', async () => (await podsOf(cluster, NS, `app=${name}`)).length === 0, {
        timeoutMs: 240_000,
        intervalMs: 1000,
      });
      await sleep(3000);
    };
    const look = async (): Promise<Record<string, number>> => {
      const inventory = await takeInventory();
      const figures: Record<string, number> = {
        programs: inventory['BPF program']?.size ?? 0,
        maps: inventory['BPF map']?.size ?? 0,
        links: inventory['BPF link']?.size ?? 0,
      };
      for (const node of ['node1', 'node2']) {
        for (const container of ['agent', 'proxy']) {
          const pid = await containerPid(cluster, await meshPod(cluster, node), container);
          figures[`${node} ${container} descriptors`] = readdirSync(`/proc/${pid}/fd`).length;
          const rss = /VmRSS:\s*(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
          figures[`${node} ${container} RSS MB`] = Math.round(Number(rss) / 1024);
        }
      }
      return figures;
    };
    // The first round fills pools and caches; what the second adds would be a leak.
    await round('burst-one');
    const before = await look();
    await round('burst-two');
    const after = await look();
    figure('after one burst', JSON.stringify(before));
    figure('after two bursts', JSON.stringify(after));
    for (const [name, value] of Object.entries(after)) {
      const room = name.endsWith('MB') ? 25 : name.endsWith('descriptors') ? 8 : 0;
      expect(value, name).toBeLessThanOrEqual((before[name] ?? 0) + room);
    }
  }, 900_000);
});
