/** `ebbtide status` against real agents: its exit code follows the datapath, not what somebody remembers. */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { EBBTIDE, type Finished, type Lab, placed, run } from '../../src/lab/index.ts';
import { captured, labWith } from '../lib/mesh-lab.ts';
import { startServer } from '../lib/peers.ts';

async function statusLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  lab.namespace('plain', { mesh: false });
  const near = await lab.pod({ name: 'client', namespace: 'meshed', node: 1 });
  await lab.pod({ name: 'outsider', namespace: 'plain', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  await lab.startMesh();
  await captured(lab, near, server);
}

// One story told in order.
describe('status', () => {
  let lab: Lab;
  beforeAll(async () => {
    ({ lab } = await labWith(async (made) => {
      await statusLab(made);
      return {};
    }));
  });
  afterAll(() => lab?.close());

  function status(...argv: string[]): Promise<Finished> {
    const command = [process.execPath, EBBTIDE, 'status', ...argv];
    return run(placed(lab.node(1).place, command), { env: { INPOD_UDS: join(lab.ground.directory, 'node1.sock') } });
  }

  it('0: the captured pod has its programs, its listeners and a recent connection; the other pod is not wanted', async () => {
    const { code, stdout } = await status();
    expect(code, stdout).toBe(0);
    expect(stdout).toMatch(/^meshed\/client +in the mesh +captured +outbound, inbound, guard +outbound [1-9]/m);
    // Dated by the kernel's clock and ours alike.
    expect(Number(/^meshed\/client .* (\d+) s ago$/m.exec(stdout)?.[1])).toBeLessThan(60);
    expect(stdout).toMatch(/^plain\/outsider +not +not enrolled .*not labelled$/m);
  });

  it('0: one pod as JSON, with the figures of the datapath', async () => {
    const { code, stdout } = await status('meshed/client', '--output', 'json');
    expect(code, stdout).toBe(0);
    const { node, pods } = JSON.parse(stdout) as { node: string; pods: { name: string; capture: object }[] };
    expect({ node, names: pods.map(({ name }) => name) }).toEqual({ node: 'node1', names: ['client'] });
    expect(pods[0]?.capture).toMatchObject({ guard: 'attached', capturedConnections: expect.stringMatching(/^[1-9]/) });
  });

  it('1 without the proxy, 2 without the agent', async () => {
    await lab.node(1).proxy?.stop('SIGKILL');
    const alone = await status();
    expect(alone.code, alone.stdout).toBe(1);
    expect(alone.stdout).toMatch(/^meshed\/client .*outbound 0, hbone 0, plaintext 0 .*waiting for proxy$/m);
    await lab.node(1).agent?.stop('SIGKILL');
    const gone = await status();
    expect(gone.code).toBe(2);
    expect(gone.stderr).toContain('node1.sock.status');
  });
});
