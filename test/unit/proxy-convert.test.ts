import { describe, expect, it } from 'vitest';
import { ADDRESS_TYPE, AUTHORIZATION_TYPE } from '../../src/mesh/control-plane.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import type { EnginePolicy, EngineService, EngineWorkload } from '../../src/proxy/engine.ts';
import { convertResource } from '../../src/proxy/xds/decode.ts';
import { policy, service, workload } from './proxy-peer.ts';

const ip = (...bytes: number[]): Uint8Array => Uint8Array.from(bytes);
const asWorkload = (properties: istio.workload.Workload.$Properties): EngineWorkload =>
  convertResource(ADDRESS_TYPE, workload(properties)).value as EngineWorkload;
const asService = (properties: istio.workload.Service.$Properties): EngineService =>
  convertResource(ADDRESS_TYPE, service(properties)).value as EngineService;
const asPolicy = (properties: istio.security.Authorization.$Properties): EnginePolicy =>
  convertResource(AUTHORIZATION_TYPE, policy(properties)).value as EnginePolicy;
const matchOf = (match: istio.security.Match.$Properties) =>
  asPolicy({ name: 'p', namespace: 'n', rules: [{ clauses: [{ matches: [match] }] }] }).rules[0]?.[0]?.[0];

describe('workloads', () => {
  it('fills in defaults', () => {
    expect(asWorkload({ uid: 'u', addresses: [ip(10, 0, 0, 1)] })).toMatchObject({
      uid: 'u',
      trustDomain: 'cluster.local',
      serviceAccount: 'default',
      clusterId: 'Kubernetes',
      capacity: 1,
      healthy: true,
      hbone: false,
      workloadType: 'deployment',
      addresses: [ip(10, 0, 0, 1)],
    });
    expect(asWorkload({ uid: 'u', capacity: { value: 0 } }).capacity).toBe(0);
  });

  it('takes gateways, services and ports', () => {
    const converted = asWorkload({
      uid: 'u',
      tunnelProtocol: 1,
      waypoint: { hostname: { namespace: 'a', hostname: 'w.a' }, hboneMtlsPort: 15008 },
      networkGateway: { address: { network: 'x', address: ip(1, 2, 3, 4) }, hboneMtlsPort: 15008 },
      services: { 'a/b.c': { ports: [{ servicePort: 80, targetPort: 8080 }] } },
      applicationTunnel: { protocol: 1, port: 81 },
      networkMode: 1,
      status: 1,
    });
    expect(converted).toMatchObject({
      hbone: true,
      healthy: false,
      hostNetwork: true,
      waypoint: { hostname: { namespace: 'a', hostname: 'w.a' }, hboneMtlsPort: 15008 },
      networkGateway: { address: { network: 'x', address: ip(1, 2, 3, 4) } },
      services: [{ key: 'a/b.c', ports: [{ servicePort: 80, targetPort: 8080 }] }],
      applicationTunnel: { proxy: true, port: 81 },
    });
  });

  it.each<[string, istio.workload.Workload.$Properties, RegExp]>([
    ['no uid', { name: 'x' }, /uid is empty/],
    ['an address of 5 bytes', { uid: 'u', addresses: [ip(1, 2, 3, 4, 5)] }, /addresses\[0\] has 5 bytes/],
    ['legacy mutual TLS', { uid: 'u', tunnelProtocol: 2 }, /LEGACY_ISTIO_MTLS/],
    ['an unknown protocol', { uid: 'u', tunnelProtocol: 9 as 0 }, /tunnel_protocol has the unknown value 9/],
    ['an unknown type', { uid: 'u', workloadType: 9 as 0 }, /workload_type/],
    ['an unknown status', { uid: 'u', status: 9 as 0 }, /status/],
    ['a waypoint without destination', { uid: 'u', waypoint: { hboneMtlsPort: 1 } }, /waypoint has no destination/],
    ['a port above 65535', { uid: 'u', applicationTunnel: { port: 65_536 } }, /above 65535/],
    ['a service key of another shape', { uid: 'u', services: { x: {} } }, /namespace\/hostname/],
  ])('refuses %s', (_, properties, reason) => {
    expect(() => asWorkload(properties)).toThrow(reason);
  });

  it('refuses an address of neither kind and bytes that are no message', () => {
    expect(() => convertResource(ADDRESS_TYPE, new Uint8Array())).toThrow(/neither a workload nor a service/);
    expect(() => convertResource(ADDRESS_TYPE, ip(0x0a, 0xff, 0xff))).toThrow();
    expect(() => convertResource(AUTHORIZATION_TYPE, ip(0x0a, 0x05, 0x61))).toThrow();
  });
});

describe('services', () => {
  it('takes addresses, load balancing and visibility', () => {
    expect(
      asService({
        name: 's',
        namespace: 'n',
        hostname: 's.n.svc',
        addresses: [{ network: '', address: ip(10, 0, 0, 0), length: 24 }, { address: ip(10, 1, 0, 0) }],
        loadBalancing: { routingPreference: [6, 1], mode: 2, healthPolicy: 1 },
        visibility: 1,
        ipFamilies: 3,
      }),
    ).toMatchObject({
      vips: [{ length: 24 }, { network: '' }],
      routingPreference: [6, 1],
      mode: 2,
      allowUnhealthy: true,
      namespaceVisibility: true,
      ipFamilies: 3,
    });
    expect(asService({ hostname: 'h', visibility: 9 as 0 }).namespaceVisibility).toBe(false);
  });

  it.each<[string, istio.workload.Service.$Properties, RegExp]>([
    ['no hostname', { name: 's' }, /hostname is empty/],
    ['an unspecified scope', { hostname: 'h', loadBalancing: { routingPreference: [0] } }, /UNSPECIFIED_SCOPE/],
    ['an unknown scope', { hostname: 'h', loadBalancing: { routingPreference: [7 as 1] } }, /routing_preference/],
    ['an unknown mode', { hostname: 'h', loadBalancing: { mode: 4 as 1 } }, /mode/],
    ['too long a prefix', { hostname: 'h', addresses: [{ address: ip(1, 2, 3, 4), length: 33 }] }, /prefix of 33/],
  ])('refuses %s', (_, properties, reason) => {
    expect(() => asService(properties)).toThrow(reason);
  });
});

describe('policies', () => {
  it('keeps rules, clauses, matches and both lists of each attribute', () => {
    const converted = asPolicy({
      name: 'p',
      namespace: 'n',
      scope: 2,
      action: 1,
      dryRun: true,
      rules: [
        {
          clauses: [
            { matches: [{ principals: [{ exact: 'a' }, { prefix: '' }], notPrincipals: [{ presence: {} }] }] },
            { matches: [{ destinationPorts: [80], notDestinationPorts: [81] }, {}] },
          ],
        },
        {},
      ],
    });
    expect(converted).toMatchObject({ scope: 'workload', action: 'deny', dryRun: true });
    expect(converted.rules[0]?.[0]?.[0]).toMatchObject({
      principals: {
        anyOf: [
          { kind: 'exact', value: 'a' },
          { kind: 'prefix', value: '' },
        ],
        noneOf: [{ kind: 'presence' }],
      },
      malformed: false,
    });
    expect(converted.rules[0]?.[1]).toHaveLength(2);
    expect(converted.rules[1]).toEqual([]);
  });

  it.each<[string, istio.security.Match.$Properties]>([
    ['a string match of no kind', { principals: [{ exact: 'a' }, {}] }],
    ['an address of 3 bytes', { sourceIps: [{ address: ip(1, 2, 3), length: 8 }] }],
    ['too long a prefix', { notDestinationIps: [{ address: ip(1, 2, 3, 4), length: 33 }] }],
    ['a port above 65535', { destinationPorts: [65_616] }],
    ['an extension', { principals: [{ exact: 'a' }], extensions: [{ name: 'x' }] }],
  ])('marks a match with %s and does not drop it', (_, match) => {
    expect(matchOf(match)?.malformed).toBe(true);
  });

  it('marks what is newer than this program', () => {
    const exact = istio.security.Match.encode({ principals: [{ exact: 'a' }] }).finish();
    const newer = Buffer.concat([exact, Buffer.from([0xfa, 0x01, 0x01, 0x41])]); // field 31, one byte
    const wrap = (field: number, bytes: Uint8Array): Buffer =>
      Buffer.concat([Buffer.from([(field << 3) | 2, bytes.length]), bytes]);
    const head = istio.security.Authorization.encode({ name: 'p', namespace: 'n' }).finish();
    const unknown = Buffer.from([0xfa, 0x01, 0x01, 0x41]);
    const read = (rule: Uint8Array) =>
      (convertResource(AUTHORIZATION_TYPE, Buffer.concat([head, wrap(5, rule)])).value as EnginePolicy).rules;
    expect(read(wrap(1, wrap(2, newer)))[0]?.[0]?.[0]?.malformed).toBe(true);
    expect(read(wrap(1, wrap(2, exact)))[0]?.[0]?.[0]?.malformed).toBe(false);
    expect(read(wrap(1, unknown))[0]?.[0]?.[0]?.malformed).toBe(true);
    expect(read(unknown)[0]?.[0]?.[0]?.malformed).toBe(true);
  });

  it('refuses a policy of an unknown scope or action', () => {
    expect(() => asPolicy({ name: 'p', scope: 3 as 0 })).toThrow(/scope has the unknown value 3/);
    expect(() => asPolicy({ name: 'p', action: 2 as 0 })).toThrow(/action has the unknown value 2/);
    expect(() => asPolicy({ namespace: 'n' })).toThrow(/name is empty/);
  });
});
