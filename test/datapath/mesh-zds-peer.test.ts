/** Root in a pod that sees the node's file system calls at the ZDS socket: it is no proxy, and stays captured. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readStatus } from '../../src/agent/status.ts';
import { type AccessLine, type Finished, type Lab, placed, run, waitFor } from '../../src/lab/index.ts';
import { captured, labWith, processes } from '../lib/mesh-lab.ts';
import { PORT, startServer } from '../lib/peers.ts';

const PROGRAM = fileURLToPath(new URL('../lib/programs/zds.py', import.meta.url));

async function zdsLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const root = await lab.pod({ name: 'root', namespace: 'meshed', node: 1 });
  const stranger = await lab.pod({ name: 'stranger', namespace: 'plain', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  await lab.startMesh();
  await captured(lab, root, server);
  return { root, stranger, server, socket: join(lab.ground.directory, 'node1.sock') };
}

interface Came {
  readonly messages: number;
  readonly descriptors: number;
  readonly closed: boolean;
  readonly moved: boolean;
  readonly answer?: { readonly peer: string };
  readonly error?: string;
}

describe('at the ZDS socket', () => {
  let made: Awaited<ReturnType<typeof zdsLab>> & { lab: Lab };
  beforeAll(async () => {
    made = await labWith(zdsLab);
  });
  afterAll(() => made?.lab.close());

  const argv = (...more: string[]): string[] => [
    'python3',
    PROGRAM,
    made.socket,
    made.server.addresses.v4,
    `${PORT.whoami}`,
    ...more,
  ];
  function came(done: Finished): Came {
    if (done.code !== 0) throw new Error(`the program failed (${done.code}): ${done.stderr}`);
    return JSON.parse(done.stdout) as Came;
  }
  const logged = (event: string): Record<string, unknown>[] =>
    readFileSync(made.lab.node(1).log('agent'), 'utf8')
      .split('\n')
      .filter((line) => line.includes(`"event":"${event}"`))
      .map((line) => JSON.parse(line) as Record<string, unknown>);
  const inbound = (): AccessLine[] =>
    made.lab
      .node(2)
      .accessLog()
      .filter((line) => line.direction === 'inbound');
  const proxies = async () => (await readStatus(`${made.socket}.status`)).proxies;

  /** The connection that the program made afterwards went through the mesh as the pod's. */
  async function stayedCaptured(result: Came, before: number): Promise<void> {
    expect(result.error).toBeUndefined();
    expect(result.answer?.peer).toBe(made.root.addresses.v4);
    const line = await waitFor('its line', () => inbound()[before], { hint: () => processes(made.lab) });
    expect(line).toMatchObject({ 'src.identity': made.root.identity });
  }

  it('a process in a captured pod is refused, is told of nothing, and stays captured', async () => {
    const { root } = made;
    const [refusals, lines] = [logged('zds_refused').length, inbound().length];
    const result = came(await root.run(argv()));
    expect(result).toMatchObject({ closed: true, messages: 0, descriptors: 0 });
    await stayedCaptured(result, lines);
    const fresh = logged('zds_refused').slice(refusals);
    expect(fresh).toHaveLength(1);
    expect(fresh[0]?.reason).toMatch(/network namespace of pod meshed\/root/);
  });

  it('so is one that is in the cgroup of the proxy', async () => {
    const { root, lab } = made;
    const place = { netns: root.place.netns, cgroup: lab.node(1).place.cgroup };
    const lines = inbound().length;
    const result = came(await run(placed(place, argv())));
    expect(result).toMatchObject({ closed: true, messages: 0 });
    await stayedCaptured(result, lines);
  });

  it('a process in a pod outside of the mesh is refused too', async () => {
    const refusals = logged('zds_refused').length;
    const result = came(await made.stranger.run(argv()));
    expect(result).toMatchObject({ closed: true, messages: 0, descriptors: 0 });
    expect(logged('zds_refused').slice(refusals)[0]?.reason).toMatch(/pod plain\/stranger/);
  });

  it('a process in a namespace that root made in the pod is refused', async () => {
    const refusals = logged('zds_refused').length;
    const result = came(await made.root.run(['unshare', '--net', ...argv()]));
    expect(result).toMatchObject({ closed: true, messages: 0, descriptors: 0 });
    expect(logged('zds_refused').slice(refusals)[0]?.reason).toMatch(/another network namespace than the agent/);
  });

  it('a process of the node that moves into a pod once it is trusted loses that trust', async () => {
    const { root, lab, server } = made;
    const [real] = await proxies();
    const [lost, lines] = [logged('zds_distrusted').length, inbound().length];
    const result = came(await run(placed(lab.node(1).place, argv(root.place.netns))));
    expect(result).toMatchObject({ closed: true, moved: true });
    expect(result.messages).toBeGreaterThan(0);
    await stayedCaptured(result, lines);
    expect(logged('zds_distrusted').slice(lost)).toMatchObject([{ reason: expect.stringMatching(/pod meshed\/root/) }]);
    expect(await proxies()).toEqual([real]);
    await captured(lab, root, server);
  });

  it('the proxy itself is trusted all the while, also after the agent has started again', async () => {
    const { lab, root, server } = made;
    const node = lab.node(1);
    await node.agent?.stop('SIGKILL');
    await node.startAgent();
    await waitFor('the proxy to be back', async () => (await proxies()).includes(node.proxy?.pid ?? 0), {
      hint: () => processes(lab),
    });
    await captured(lab, root, server);
    const own = (line: Record<string, unknown>): boolean => line.proxy === node.proxy?.pid;
    expect([...logged('zds_refused'), ...logged('zds_distrusted'), ...logged('zds_not_trusted')].filter(own)).toEqual(
      [],
    );
    // What was refused before is refused by the agent that adopted the pods, too.
    expect(came(await root.run(argv()))).toMatchObject({ closed: true, messages: 0 });
  });
});
