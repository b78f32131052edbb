import { mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { parseMetrics } from '../../src/lab/mesh.ts';
import { createLogger } from '../../src/mesh/log.ts';
import type {
  AccessRecord,
  ConnectionInfo,
  Engine,
  EngineListener,
  EngineStats,
  LocalPod,
  StateDelta,
  TrafficSample,
} from '../../src/proxy/engine.ts';
import { type RunningProxy, startProxy } from '../../src/proxy/proxy.ts';
import { readSettings } from '../../src/proxy/settings.ts';
import { AccessLog } from '../../src/proxy/telemetry/access-log.ts';
import { LogStream } from '../../src/proxy/telemetry/log-stream.ts';
import { ADDRESS, Peer, POLICY, policy, response, service, until, workload } from './proxy-peer.ts';

const record: AccessRecord = {
  inbound: false,
  established: true,
  reason: 'none',
  hint: '',
  responseFlag: '-',
  detail: '',
  source: '10.0.0.1:1000',
  destination: '10.0.0.2:80',
  hboneAddress: '10.0.0.2:15008',
  sourceWorkload: { name: 'a', namespace: 'n', cluster: 'Kubernetes' },
  destinationWorkload: { name: 'b', namespace: 'm', cluster: 'Kubernetes' },
  service: 'b.m.svc',
  sourceIdentity: 'spiffe://cluster.local/ns/n/sa/a',
  destinationIdentity: 'spiffe://cluster.local/ns/m/sa/b',
  bytesSent: 10,
  bytesReceived: 20,
  durationMs: 12.6,
  traceId: '0123456789abcdef0123456789abcdef',
};
const refused: AccessRecord = {
  ...record,
  inbound: true,
  established: false,
  reason: 'policy-denied',
  hint: 'see the policy',
  responseFlag: 'DENY',
  detail: 'n/p',
};

let directory = '';
afterEach(() => {
  if (directory !== '') rmSync(directory, { recursive: true, force: true });
  directory = '';
});

/** What is logged by `work`, line by line. */
async function logged(
  work: (log: ReturnType<typeof createLogger>, stream: LogStream) => Promise<void> | void,
): Promise<Record<string, unknown>[]> {
  directory = mkdtempSync(join(tmpdir(), 'proxy-log-'));
  const file = join(directory, 'log');
  const stream = new LogStream(openSync(file, 'w'));
  await work(createLogger('proxy', stream), stream);
  stream.flushSync();
  return readFileSync(file, 'utf8')
    .trim()
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as Record<string, unknown>);
}

describe('access log', () => {
  it('is written by hand exactly as the logger would, whatever a text holds', async () => {
    const { sourceWorkload: _, destinationWorkload: __, ...bare } = record;
    const odd = 'a"b\\c\n\u0001\u007f\u2028é😀';
    const records: AccessRecord[] = [
      record,
      refused,
      { ...bare, sourceIdentity: '', destinationIdentity: '', hboneAddress: '', service: '', traceId: '' },
      { ...refused, detail: odd, service: odd, hint: '', sourceWorkload: { name: odd, namespace: odd, cluster: odd } },
      { ...refused, detail: '' },
    ];
    const byLogger = await logged((log) => new AccessLog(log, 'all').onAccess(records));
    const texts: string[] = [];
    const counts: number[] = [];
    const write = (text: string, lines: number): void => {
      texts.push(text);
      counts.push(lines);
    };
    new AccessLog(createLogger('proxy', { write: () => {} }), 'all', { write }).onAccess(records);
    expect(counts).toEqual([records.length]);
    const withoutTime = (line: object) => ({ ...line, time: '' });
    const byHand = texts.join('').trimEnd().split('\n');
    expect(byHand.map((line) => withoutTime(JSON.parse(line)))).toEqual(byLogger.map(withoutTime));
    expect(Object.keys(JSON.parse(byHand[1] ?? ''))).toEqual(Object.keys(byLogger[1] ?? {}));
  });

  it('has ztunnel’s field names', async () => {
    const [line] = await logged((log) => new AccessLog(log, 'all').onAccess([record]));
    expect(line).toMatchObject({
      level: 'info',
      msg: 'connection complete',
      'src.addr': '10.0.0.1:1000',
      'src.workload': 'a',
      'src.namespace': 'n',
      'src.identity': 'spiffe://cluster.local/ns/n/sa/a',
      'dst.addr': '10.0.0.2:80',
      'dst.hbone_addr': '10.0.0.2:15008',
      'dst.service': 'b.m.svc',
      'dst.workload': 'b',
      'dst.namespace': 'm',
      'dst.identity': 'spiffe://cluster.local/ns/m/sa/b',
      direction: 'outbound',
      bytes_sent: 10,
      bytes_recv: 20,
      duration: '13ms',
      trace_id: record.traceId,
    });
    expect(line).not.toHaveProperty('error');
  });

  it('tells refusals as warnings with reason, policy and hint, and counts them', async () => {
    let access: AccessLog | undefined;
    const [line] = await logged((log) => {
      access = new AccessLog(log, 'failures');
      access.onAccess([record, refused]);
    });
    expect(line).toMatchObject({
      level: 'warn',
      msg: 'connection failed',
      reason: 'policy-denied',
      error: 'policy-denied: n/p',
      hint: 'see the policy',
      response_flags: 'DENY',
      direction: 'inbound',
    });
    expect([...(access?.refusals ?? [])]).toEqual([{ reason: 'policy-denied', direction: 'inbound', count: 1 }]);
  });

  it('counts but writes nothing when off', async () => {
    const lines = await logged((log) => new AccessLog(log, 'off').onAccess([record, refused]));
    expect(lines).toEqual([]);
  });

  it('writes 20,000 lines in order and whole, at a small part of a processor', async () => {
    const started = process.cpuUsage();
    const lines = await logged(async (log) => {
      const access = new AccessLog(log, 'all');
      for (let batch = 0; batch < 400; batch++) {
        access.onAccess(Array.from({ length: 50 }, (_, index) => ({ ...record, bytesSent: batch * 50 + index })));
        await new Promise((resolve) => setImmediate(resolve));
      }
    });
    const { user, system } = process.cpuUsage(started);
    expect(lines.map(({ bytes_sent }) => bytes_sent)).toEqual(Array.from({ length: 20_000 }, (_, index) => index));
    // 5,000 lines a second are then less than a fifth of one processor, reading them back included.
    expect((user + system) / 20_000).toBeLessThan(200);
  });

  it('drops and counts lines that nobody takes, and goes on once they are taken', async () => {
    let dropped = 0;
    const lines = await logged((_, stream) => {
      const line = `"${'x'.repeat(1 << 20)}"\n`;
      for (let index = 0; index < 12; index++) stream.write(line);
      dropped = stream.dropped;
    });
    expect(dropped).toBeGreaterThan(0);
    expect(lines.length + dropped).toBe(12);
  });
});

describe('the proxy as a whole, over a recording engine', () => {
  const labels = ['reporter', 'source_workload', 'destination_workload', 'response_flags'];

  /** Takes calls in and gives what it is told to give; carries nothing. */
  class Recorder implements Engine {
    readonly deltas: StateDelta[] = [];
    readonly calls: string[] = [];
    listener: EngineListener | undefined;
    addPod(pod: LocalPod): void {
      this.calls.push(`add ${pod.uid}`);
    }
    start(): void {
      this.calls.push('start');
    }
    removePod(uid: string): void {
      this.calls.push(`remove ${uid}`);
    }
    setCertificate(identity: string): void {
      this.calls.push(`certificate ${identity}`);
    }
    removeCertificate(): void {}
    apply(delta: StateDelta): void {
      this.deltas.push(delta);
    }
    traffic(): TrafficSample[] {
      const sample = { opened: 3, closed: 2, failed: 0, receivedBytes: 100, sentBytes: 200 };
      return [
        { labels: ['source', 'a"b\\', 'unknown', '-'], ...sample },
        { labels: ['destination', 'a', 'b', 'DENY'], ...sample, failed: 1 },
      ];
    }
    connections(): ConnectionInfo[] {
      return [];
    }
    stats(): EngineStats {
      return {
        openConnections: 1,
        hboneConnections: 2,
        handshakes: 3,
        handshakeFailures: 4,
        bufferedBytes: 5,
        accessRecordsDropped: 6,
        faults: 7,
      };
    }
    async drain(ms: number): Promise<void> {
      this.calls.push(`drain ${ms}`);
    }
    stopNow(): void {
      this.calls.push('stop');
    }
  }

  let peer: Peer;
  let proxy: RunningProxy;
  let engine: Recorder;
  let quits: number;
  const log = createLogger('proxy', { write: () => {} });

  async function start(): Promise<void> {
    peer = await Peer.start();
    engine = new Recorder();
    quits = 0;
    peer.onStream = (call) => {
      call.on('error', () => {});
      call.write(
        response(ADDRESS, '1', [
          {
            name: 'u1',
            value: workload({
              uid: 'u1',
              name: 'a',
              namespace: 'n',
              addresses: [Uint8Array.from([10, 0, 0, 1])],
              tunnelProtocol: 1,
              services: { 'n/s.n.svc': { ports: [{ servicePort: 80, targetPort: 8080 }] } },
            }),
          },
          {
            name: 'n/s.n.svc',
            value: service({
              name: 's',
              namespace: 'n',
              hostname: 's.n.svc',
              addresses: [{ address: Uint8Array.from([10, 1, 0, 1]) }],
              ports: [{ servicePort: 80, targetPort: 8080 }],
            }),
          },
        ]),
      );
      call.write(
        response(POLICY, '2', [
          {
            name: 'n/p',
            value: policy({
              name: 'p',
              namespace: 'n',
              scope: 2,
              rules: [{ clauses: [{ matches: [{ notPrincipals: [{ presence: {} }] }] }] }],
            }),
          },
        ]),
      );
    };
    const root = join(peer.directory, 'root.pem');
    proxy = await startProxy({
      settings: readSettings({
        NODE_NAME: 'node1',
        XDS_ADDRESS: `127.0.0.1:${peer.port}`,
        XDS_ROOT_CA: root,
        CA_ROOT_CA: root,
        AUTH_TOKEN: join(peer.directory, 'token'),
        INPOD_UDS: join(peer.directory, 'absent.sock'),
        EBBTIDE_ADMIN_PORT: '0',
        EBBTIDE_METRICS_PORT: '0',
        EBBTIDE_READINESS_PORT: '0',
      }),
      native: {
        createEngine: (_, listener) => {
          engine.listener = listener;
          return engine;
        },
        trafficLabelNames: labels,
        connectZds: () => {
          throw new Error('no agent');
        },
      },
      log,
      version: '0.1.0',
      onQuit: () => quits++,
    });
  }
  const get = (port: number, path: string, method = 'GET') => fetch(`http://127.0.0.1:${port}${path}`, { method });

  it('serves metrics, readiness, dump and levels', async () => {
    await start();
    try {
      expect(engine.calls).toEqual(['start']);
      await until(() => engine.deltas.length === 2);
      const notReady = await get(proxy.ports.readiness, '/healthz/ready');
      expect(notReady.status).toBe(500);
      expect(await notReady.text()).toBe('not ready, pending: pods from the node agent\n');
      expect((await get(proxy.ports.readiness, '/healthz/ready', 'POST')).status).toBe(405);
      expect((await get(proxy.ports.readiness, '/other')).status).toBe(404);

      engine.listener?.onAccess([refused]);
      const page = await (await get(proxy.ports.metrics, '/metrics')).text();
      const metrics = parseMetrics(page);
      const find = (name: string, wanted: Record<string, string> = {}) =>
        metrics.filter((m) => m.name === name && Object.entries(wanted).every(([k, v]) => m.labels[k] === v));
      expect(find('istio_tcp_connections_opened_total')).toHaveLength(2);
      expect(find('istio_tcp_connections_failed_total')).toMatchObject([
        { value: 1, labels: { reporter: 'destination', response_flags: 'DENY' } },
      ]);
      expect(find('istio_tcp_received_bytes_total', { reporter: 'source' })).toMatchObject([{ value: 100 }]);
      expect(find('istio_tcp_sockets_open')).toMatchObject([
        { value: 1, labels: { reporter: 'source' } },
        { value: 1, labels: { reporter: 'destination' } },
      ]);
      expect(page).toContain('source_workload="a\\"b\\\\"');
      expect(find('ebbtide_connections_refused_total')).toMatchObject([
        { value: 1, labels: { reason: 'policy-denied', direction: 'inbound' } },
      ]);
      expect(find('istio_build', { component: 'ztunnel', tag: '0.1.0' })).toMatchObject([{ value: 1 }]);
      expect(find('istio_xds_message_total').map(({ value }) => value)).toEqual([1, 1]);
      expect(find('workload_manager_active_proxy_count')).toMatchObject([{ value: 0 }]);
      expect(find('process_open_fds')[0]?.value).toBeGreaterThan(3);
      expect(find('ebbtide_buffered_bytes')[0]?.value).toBe(5);
      const again = parseMetrics(await (await get(proxy.ports.metrics, '/stats/prometheus')).text());
      expect(again.filter(({ name }) => name === 'istio_tcp_sent_bytes_total')[0]?.value).toBe(200);

      const dump = (await (await get(proxy.ports.admin, '/config_dump')).json()) as Record<string, unknown>;
      expect(dump).toMatchObject({
        workloads: [{ uid: 'u1', workloadIps: ['10.0.0.1'], protocol: 'HBONE' }],
        services: [{ vips: ['/10.1.0.1'], ports: { 80: 8080 }, endpoints: { u1: { port: { 80: 8080 } } } }],
        policies: [
          { name: 'p', scope: 'WorkloadSelector', action: 'Allow', rules: [[[{ notPrincipals: [{ Presence: {} }] }]]] },
        ],
        certificates: [],
        workloadState: {},
      });
      expect(JSON.stringify(dump)).not.toContain('first-token');
      expect(await (await get(proxy.ports.admin, '/logging?level=debug', 'POST')).text()).toContain('debug');
      expect(log.level).toBe('debug');
      expect((await get(proxy.ports.admin, '/logging?level=x', 'POST')).status).toBe(400);
      expect((await get(proxy.ports.admin, '/logging?level=info')).status).toBe(405);
      await get(proxy.ports.admin, '/logging?reset', 'POST');
      expect(log.level).toBe('info');
      expect((await get(proxy.ports.admin, '/quitquitquit')).status).toBe(405);
      expect((await get(proxy.ports.admin, '/quitquitquit', 'POST')).status).toBe(200);
      await until(() => quits === 1);
    } finally {
      await proxy.drain();
      peer.stop();
    }
    expect(engine.calls).toEqual(['start', 'drain 5000', 'stop']);
    await expect(get(proxy.ports.metrics, '/metrics')).rejects.toThrow();
    proxy.stopNow();
    expect(engine.calls.filter((call) => call === 'stop')).toHaveLength(1);
  });
});
