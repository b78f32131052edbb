/** Whom the agent takes for a proxy by where it runs: decided at the greeting, and again as long as it is trusted. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { processNetns } from '../../src/agent/pod-netns.ts';
import { misplaced, type ProxyPlaces } from '../../src/agent/proxy-place.ts';
import { NoProxy, ZdsServer } from '../../src/agent/zds-server.ts';
import { connectSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import type { SeqpacketConnection } from '../../src/mesh/seqpacket.ts';

const { WorkloadRequest, WorkloadResponse, ZdsHello } = istio.workload.zds;

describe('a process may be a proxy', () => {
  const places = (allowed: ProxyPlaces['allowed']): ProxyPlaces => ({
    allowed,
    own: 1n,
    podOf: (cookie) => (cookie === 7n ? 'shop/cart' : undefined),
  });
  it("in the agent's network namespace", () => {
    expect(misplaced(1n, places('own'))).toBeUndefined();
    expect(misplaced(1n, places('any'))).toBeUndefined();
  });
  it("never in a pod's, whatever is allowed", () => {
    expect(misplaced(7n, places('own'))).toMatch(/pod shop\/cart/);
    expect(misplaced(7n, places('any'))).toMatch(/pod shop\/cart/);
  });
  it('elsewhere only when that is allowed', () => {
    expect(misplaced(9n, places('own'))).toMatch(/another network namespace than the agent.*--proxy-netns any/);
    expect(misplaced(9n, places('any'))).toBeUndefined();
  });
  it('by the namespace that the kernel tells', () => {
    expect(processNetns(process.pid)).toBe(processNetns('self'));
    expect(() => processNetns(4_000_000)).toThrow(/No such file/);
  });
});

describe('the ZDS server', () => {
  let directory: string;
  let server: ZdsServer;
  let events: string[];
  let logged: string[];
  let place: () => string | undefined;
  let client: SeqpacketConnection;
  let got: string[];
  let closed: boolean;

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'ebbtide-zds-place-'));
    events = [];
    logged = [];
    place = () => undefined;
    const log = pino({}, { write: (line) => void logged.push((JSON.parse(line) as { event: string }).event) });
    server = new ZdsServer(join(directory, 'zds.sock'), log, {
      workloads: () => [],
      misplaced: (pid) => {
        expect(pid).toBe(process.pid);
        return place();
      },
      trustProxy: () => events.push('trust'),
      distrustProxy: () => events.push('distrust'),
    });
    server.listen();
  });
  afterEach(() => {
    vi.useRealTimers();
    client?.close();
    server.close();
    rmSync(directory, { recursive: true });
  });

  function connect(): void {
    got = [];
    closed = false;
    client = connectSeqpacket(join(directory, 'zds.sock'));
    client.onClose(() => {
      closed = true;
    });
    client.onMessage(({ data }) => {
      got.push(Object.keys(WorkloadRequest.decode(data).toJSON())[0] ?? '?');
      void client.send(WorkloadResponse.encode({ ack: {} }).finish());
    });
  }
  const greet = (): void => void client.send(ZdsHello.encode({ version: 1 }).finish()).catch(() => {});

  it('closes the connection of a misplaced process at once', async () => {
    place = () => 'in a pod';
    connect();
    await vi.waitFor(() => expect(closed).toBe(true));
    expect(events).toEqual([]);
    expect(logged).toContain('zds_refused');
  });

  it('refuses a process whose namespace cannot be found out', async () => {
    place = () => {
      throw new Error('no such process');
    };
    connect();
    await vi.waitFor(() => expect(closed).toBe(true));
    expect(events).toEqual([]);
  });

  it('looks again at the greeting', async () => {
    connect();
    await vi.waitFor(() => expect(logged).toContain('zds_listening'));
    await new Promise((resolve) => setTimeout(resolve, 50));
    place = () => 'in a pod';
    greet();
    await vi.waitFor(() => expect(closed).toBe(true));
    expect(events).toEqual([]);
    expect(got).toEqual([]);
    expect(logged).toContain('zds_not_trusted');
  });

  it('takes trust back from a process that moves while it is trusted, before it is told of anything', async () => {
    connect();
    place = () => (events.includes('trust') ? 'in a pod' : undefined);
    greet();
    await vi.waitFor(() => expect(closed).toBe(true));
    expect(events).toEqual(['trust', 'distrust']);
    expect(got).toEqual([]);
    expect(server.proxies()).toEqual([]);
  });

  it('takes trust back from a process that moves later', async () => {
    connect();
    greet();
    await vi.waitFor(() => expect(got).toEqual(['snapshotSent']));
    expect(events).toEqual(['trust']);
    place = () => 'in a pod';
    await vi.waitFor(() => expect(closed).toBe(true), { timeout: 5000 });
    expect(events).toEqual(['trust', 'distrust']);
    expect(logged).toContain('zds_distrusted');
    expect(server.proxies()).toEqual([]);
  });

  it('does not tell a process of the pod in which it turns out to be', async () => {
    connect();
    greet();
    await vi.waitFor(() => expect(got).toEqual(['snapshotSent']));
    place = () => 'in a pod';
    const pod = { uid: 'a', name: 'a', namespace: 'n', serviceAccount: 's', netnsFd: () => 0 };
    await expect(server.add(pod)).rejects.toThrow(NoProxy);
    expect(got).toEqual(['snapshotSent']);
    expect(events).toEqual(['trust', 'distrust']);
  });

  it('goes on trusting a process whose namespace cannot be read for once', async () => {
    connect();
    greet();
    await vi.waitFor(() => expect(got).toEqual(['snapshotSent']));
    let asked = 0;
    place = () => {
      asked++;
      throw new Error('too many open files');
    };
    await vi.waitFor(() => expect(asked).toBeGreaterThan(0), { timeout: 5000 });
    expect(closed).toBe(false);
    expect(events).toEqual(['trust']);
  });
});
