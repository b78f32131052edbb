import { describe, expect, it } from 'vitest';
import { parseDuration } from '../../src/mesh/duration.ts';
import { parseEndpoint, parseWorkers, readSettings } from '../../src/proxy/settings.ts';
import { describeVariables, VARIABLES } from '../../src/proxy/variables.ts';

describe('settings of the proxy', () => {
  it('has ztunnel’s defaults', () => {
    const settings = readSettings({ NODE_NAME: 'n1' });
    expect(settings).toMatchObject({
      nodeName: 'n1',
      xds: { host: 'localhost', port: 15012, rootCa: './var/run/secrets/istio/root-cert.pem' },
      ca: { host: 'localhost', port: 15012 },
      inpodUds: '/var/run/ztunnel/ztunnel.sock',
      clusterId: 'Kubernetes',
      secretTtlSeconds: 86_400,
      streamWindow: 4 << 20,
      connectionWindow: 16 << 20,
      frameSize: 1 << 20,
      maxStreamsPerConnection: 100,
      poolIdleMs: 300_000,
      drainMs: 5000,
      accessLog: 'all',
    });
    const inCluster = readSettings({ NODE_NAME: 'n1', KUBERNETES_SERVICE_HOST: '10.0.0.1' });
    expect(inCluster.ca.host).toBe('istiod.istio-system.svc');
  });

  it('derives how long to drain from the grace period', () => {
    const drain = (env: Record<string, string>): number => readSettings({ NODE_NAME: 'n', ...env }).drainMs;
    expect(drain({ TERMINATION_GRACE_PERIOD_SECONDS: '30' })).toBe(25_000);
    expect(drain({ TERMINATION_GRACE_PERIOD_SECONDS: '10' })).toBe(9000);
    expect(drain({ TERMINATION_GRACE_PERIOD_SECONDS: '1' })).toBe(1000);
    expect(drain({ TERMINATION_GRACE_PERIOD_SECONDS: '30', CONNECTION_TERMINATION_DEADLINE: '7s' })).toBe(7000);
  });

  it('tells all that is wrong at once', () => {
    const env = { XDS_ADDRESS: 'http://a:1', SECRET_TTL: 'soon', HTTP2_FRAME_SIZE: '1', EBBTIDE_ACCESS_LOG: 'some' };
    let message = '';
    try {
      readSettings(env);
    } catch (error) {
      message = (error as Error).message;
    }
    for (const name of ['NODE_NAME', 'XDS_ADDRESS', 'SECRET_TTL', 'HTTP2_FRAME_SIZE', 'EBBTIDE_ACCESS_LOG']) {
      expect(message).toContain(name);
    }
  });

  it('reads headers and node metadata by prefix', () => {
    const settings = readSettings({
      NODE_NAME: 'n',
      XDS_HEADER_X_Tenant: 'a',
      CA_HEADER_y: 'b',
      ISTIO_META_ISTIO_VERSION: '1.30',
      ISTIO_METAJSON_LABELS: '{"app":"x"}',
      ISTIO_META_CLUSTER_ID: 'c1',
      CLUSTER_ID: 'c2',
    });
    expect(settings.xds.headers).toEqual(new Map([['x_tenant', 'a']]));
    expect(settings.ca.headers).toEqual(new Map([['y', 'b']]));
    expect(settings.metadata.get('LABELS')).toEqual({ app: 'x' });
    expect(settings.metadata.get('ISTIO_VERSION')).toBe('1.30');
    expect(settings.clusterId).toBe('c1');
  });

  it('parses endpoints', () => {
    expect(parseEndpoint('https://10.1.2.3:99')).toEqual({ host: '10.1.2.3', port: 99 });
    expect(parseEndpoint('[::1]:99')).toEqual({ host: '::1', port: 99 });
    expect(parseEndpoint('istiod.istio-system.svc')).toEqual({ host: 'istiod.istio-system.svc', port: 15012 });
    for (const bad of ['', 'http://a:1', 'a:b', 'a:0', 'a:70000', '[1]:2', 'a/b', '::1:15012']) {
      expect(() => parseEndpoint(bad), bad).toThrow();
    }
  });

  it('parses durations', () => {
    expect(parseDuration('24h')).toBe(86_400_000);
    expect(parseDuration('1h30m')).toBe(5_400_000);
    expect(parseDuration('250ms')).toBe(250);
    expect(parseDuration('30')).toBe(30_000);
    for (const bad of ['', '0s', '-1s', '1x', 's', '99999999999h']) expect(() => parseDuration(bad), bad).toThrow();
  });

  it('parses worker counts', () => {
    expect(parseWorkers('0', 8)).toBe(8);
    expect(parseWorkers('25%', 8)).toBe(2);
    expect(parseWorkers('1%', 8)).toBe(1);
    expect(parseWorkers('3', 8)).toBe(3);
    for (const bad of ['x', '-1', '1.5', '999']) expect(() => parseWorkers(bad, 8), bad).toThrow();
  });

  it('lists every variable in its help', () => {
    const help = describeVariables();
    for (const { name } of VARIABLES) expect(help).toContain(name);
  });
});
