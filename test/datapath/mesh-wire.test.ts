/**
 * The wire between the nodes from before the mesh is there until it has stopped: whatever starts, dies or stops meanwhile,
 * no connection between captured pods that was made since they were captured carries a byte in clear.
 */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  analyseCapture,
  type Lab,
  type Pod,
  sleep,
  type WireConnection,
  type WireReport,
} from '../../src/lab/index.ts';
import { HBONE_PORT } from '../../src/mesh/ports.ts';
import { captured, labWith } from '../lib/mesh-lab.ts';
import { Background, PORT, startServer } from '../lib/peers.ts';

const LOAD_SECONDS = 40;
/** What the load sends (client.py). */
const MARKER = 'payload-in-clear';

async function wireLab(lab: Lab) {
  lab.namespace('meshed', { mesh: true });
  const near = await lab.pod({ name: 'near', namespace: 'meshed', node: 1 });
  const far = await lab.pod({ name: 'far', namespace: 'meshed', node: 2 });
  await startServer(near);
  await startServer(far);
  return { near, far };
}

describe('the wire', () => {
  let made: { near: Pod; far: Pod; lab: Lab };
  let report: WireReport;
  /** When both pods were captured, and when the agents were told to let go of them. */
  let capturedMs = 0;
  let releasedMs = 0;
  let loads: Record<string, unknown>[];
  let proxiesStopped: boolean[];

  beforeAll(async () => {
    made = await labWith(wireLab);
    const { lab, near, far } = made;
    const recording = await lab.recordWire('whole', 4096);
    // Both directions and both families, new connections all the time and one that is older than the mesh.
    const running = await Promise.all([
      Background.start(near, 'load', far.addresses.v4, PORT.echo, LOAD_SECONDS),
      Background.start(near, 'load', far.addresses.v6, PORT.echo, LOAD_SECONDS),
      Background.start(far, 'load', near.addresses.v4, PORT.echo, LOAD_SECONDS),
    ]);
    await sleep(1500);
    await lab.startMesh();
    await captured(lab, near, far);
    await captured(lab, far, near);
    capturedMs = Math.max(...lab.nodes.map((node) => capturedAt(node.log('agent'))));
    await sleep(2000);
    for (const node of lab.nodes) {
      await node.agent?.stop('SIGKILL');
      await sleep(700);
      await node.startAgent();
      await sleep(700);
    }
    for (const node of lab.nodes) {
      await node.proxy?.stop('SIGKILL');
      await sleep(700);
      await node.startProxy();
      await node.ready();
    }
    await captured(lab, near, far);
    await lab.controller?.stop('SIGKILL');
    await sleep(700);
    // ^C in a terminal is SIGINT: the end of it all, under load.
    proxiesStopped = [];
    for (const node of lab.nodes) proxiesStopped.push((await node.proxy?.stop('SIGINT')) ?? false);
    await sleep(1000);
    releasedMs = Date.now();
    for (const node of lab.nodes) proxiesStopped.push((await node.agent?.stop('SIGINT')) ?? false);
    loads = await Promise.all(running.map((load) => load.result()));
    report = analyseCapture(await recording.stop(), [MARKER]);
  }, 150_000);
  afterAll(() => made?.lab.close());

  /** Connections that began in this time and carried something. */
  const between = (from: number, to: number): WireConnection[] =>
    report.connections.filter((each) => each.startedMs >= from && each.startedMs < to && each.payloadBytes > 0);
  const isTls = ({ protocol }: WireConnection): boolean =>
    ['tls1.3', 'unanswered TLS', 'TLS without ServerHello'].includes(protocol);

  it('the recording sees plain text where there is some: before the mesh, and after it', () => {
    for (const [from, to] of [
      [0, capturedMs],
      [releasedMs, Number.POSITIVE_INFINITY],
    ] as const) {
      const plain = between(from, to).filter(({ serverPort }) => serverPort === PORT.echo);
      expect(plain.length).toBeGreaterThan(10);
      expect(plain.filter(isTls)).toEqual([]);
    }
    expect(report.markersFound.length).toBe(1);
  });

  it('since both pods were captured nothing but TLS 1.3 to port 15008 has begun', () => {
    const during = between(capturedMs, releasedMs);
    expect(during.filter((each) => each.serverPort !== HBONE_PORT || !isTls(each))).toEqual([]);
    // There was something to be seen: tunnels at the start, and anew after each proxy was killed.
    expect(during.filter(({ protocol }) => protocol === 'tls1.3').length).toBeGreaterThan(3);
    expect(report.others).toEqual([]);
  });

  it('the load went on in all of this, and failed only while a proxy was dead', () => {
    for (const { done, failures } of loads) {
      expect(done, JSON.stringify(failures)).toBeGreaterThan(100);
      expect(Object.keys(failures as object).length, 'without proxies nothing passes').toBeGreaterThan(0);
    }
  });

  it('SIGINT ends proxies and agents by themselves with exit code 0', () => {
    expect(proxiesStopped).toEqual([true, true, true, true]);
    for (const node of made.lab.nodes) {
      expect(node.proxy?.exitCode, node.proxy?.tail()).toBe(0);
      expect(node.agent?.exitCode, node.agent?.tail()).toBe(0);
    }
  });
});

/** When the agent said that its pod is captured, in milliseconds since 1970; the first time. */
function capturedAt(log: string): number {
  for (const line of readFileSync(log, 'utf8').split('\n')) {
    if (!line.includes('"pod_state"')) continue;
    const { to, time } = JSON.parse(line) as { to: string; time: string };
    if (to === 'captured') return Date.parse(time);
  }
  throw new Error(`no pod was captured: ${log}`);
}
