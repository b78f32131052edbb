import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { StateDelta } from '../../src/proxy/engine.ts';
import { XdsClient } from '../../src/proxy/xds/client.ts';
import { MeshState } from '../../src/proxy/xds/mesh-state.ts';
import { xdsNode } from '../../src/proxy/xds/node.ts';
import {
  ADDRESS,
  type DeltaRequest,
  Peer,
  POLICY,
  policy,
  response,
  silent,
  until,
  workload,
  type XdsCall,
} from './proxy-peer.ts';

let peer: Peer;
let client: XdsClient;
let state: MeshState;
let deltas: StateDelta[];
let requests: DeltaRequest[];
let calls: XdsCall[];
let synced: number;
let failApply: string | undefined;

beforeEach(async () => {
  peer = await Peer.start();
  [deltas, requests, calls, synced, failApply] = [[], [], [], 0, undefined];
  state = new MeshState('node1');
  peer.onStream = (call) => {
    calls.push(call);
    call.on('data', (request: DeltaRequest) => requests.push(request));
    call.on('error', () => {});
    call.on('end', () => call.end());
  };
  client = new XdsClient({
    settings: peer.settings(),
    node: xdsNode({
      nodeName: 'node1',
      podName: 'zt',
      podNamespace: 'istio-system',
      instanceIp: '1.1.1.1',
      metadata: new Map<string, unknown>([['LABELS', { a: ['b', 1, true, null] }]]),
    }),
    state,
    log: silent,
    apply: (delta) => {
      if (failApply !== undefined) throw new Error(failApply);
      deltas.push(delta);
    },
    onApplied: () => {},
    onSynced: () => {
      synced++;
    },
  });
});
afterEach(() => {
  client.stop();
  peer.stop();
});

const connected = async (): Promise<XdsCall> => {
  const before = requests.length;
  await until(() => requests.length >= before + 2, 'two first requests');
  return calls.at(-1) as XdsCall;
};
const w1 = { name: 'c//Pod/n/a', value: workload({ uid: 'c//Pod/n/a', name: 'a', namespace: 'n', node: 'node1' }) };
const bad = { name: 'c//Pod/n/b', value: workload({ uid: 'c//Pod/n/b', tunnelProtocol: 2 }) };

describe('xDS client', () => {
  it('subscribes to everything, policies first, with node, token and headers', async () => {
    client.start();
    const call = await connected();
    expect(requests.map(({ typeUrl }) => typeUrl)).toEqual([POLICY, ADDRESS]);
    for (const request of requests) {
      expect(request.node?.id).toBe('ztunnel~1.1.1.1~zt.istio-system~istio-system.svc.cluster.local');
      expect(request.resourceNamesSubscribe).toEqual([]);
      expect(request.responseNonce).toBe('');
    }
    const fields = requests[0]?.node?.metadata?.fields ?? {};
    expect(fields['NODE_NAME']?.stringValue).toBe('node1');
    expect(fields['LABELS']?.structValue?.fields?.['a']?.listValue?.values).toHaveLength(4);
    expect(call.metadata.get('authorization')).toEqual(['Bearer first-token']);
    expect(call.metadata.get('clusterid')).toEqual(['Kubernetes']);
    expect(call.metadata.get('x-test')).toEqual(['yes']);
  });

  it('acknowledges, and is synced once both types came', async () => {
    client.start();
    const call = await connected();
    expect(client.pending).toEqual([POLICY, ADDRESS]);
    call.write(response(ADDRESS, 'n1', [w1]));
    await until(() => requests.length === 3);
    expect(requests[2]).toMatchObject({ typeUrl: ADDRESS, responseNonce: 'n1' });
    expect(requests[2]?.errorDetail ?? null).toBeNull();
    expect(synced).toBe(0);
    call.write(response(POLICY, 'n2', []));
    await until(() => requests.length === 4);
    expect(synced).toBe(1);
    expect(client.pending).toEqual([]);
    expect(deltas[0]?.workloads.map(({ uid }) => uid)).toEqual(['c//Pod/n/a']);
    expect(state.localWorkload('n', 'a', '')).toEqual({ uid: 'c//Pod/n/a', trustDomain: 'cluster.local' });
  });

  it('rejects a bad resource by name and reason, applies the good ones, records only their versions', async () => {
    client.start();
    const call = await connected();
    call.write(response(ADDRESS, 'n1', [bad, w1, { name: 'x', value: Uint8Array.from([0x0a, 0xff]) }]));
    await until(() => requests.length === 3);
    expect(requests[2]?.errorDetail?.code).toBe(3);
    expect(requests[2]?.errorDetail?.message).toMatch(/^c\/\/Pod\/n\/b: .*LEGACY_ISTIO_MTLS.*; x: /);
    expect(deltas[0]?.workloads.map(({ uid }) => uid)).toEqual(['c//Pod/n/a']);
    expect(state.versions(ADDRESS)).toEqual({ 'c//Pod/n/a': '1' });
    expect(client.counters.rejectedResources).toBe(2);
  });

  it('keeps the former version of a resource whose new one is bad', async () => {
    client.start();
    const call = await connected();
    call.write(response(POLICY, 'n1', [{ name: 'n/p', value: policy({ name: 'p', namespace: 'n' }) }]));
    call.write(
      response(POLICY, 'n2', [
        { name: 'n/p', version: '2', value: policy({ name: 'p', namespace: 'n', action: 5 as 0 }) },
      ]),
    );
    await until(() => requests.length === 4);
    expect(state.versions(POLICY)).toEqual({ 'n/p': '1' });
    expect(state.everything().policies).toHaveLength(1);
    expect(deltas.at(-1)?.removedPolicies).toEqual([]);
  });

  it('tells its versions on a new stream, serves on meanwhile, and removes what is gone', async () => {
    client.start();
    const first = await connected();
    first.write(response(ADDRESS, 'n1', [w1]));
    first.write(response(POLICY, 'n2', [{ name: 'n/p', value: policy({ name: 'p', namespace: 'n' }) }]));
    await until(() => synced === 1);
    peer.leave();
    await until(() => !client.connected, 'the loss to be seen');
    expect(client.pending).toEqual([]);
    expect(deltas).toHaveLength(2);
    writeFileSync(join(peer.directory, 'token'), 'second-token');
    const before = requests.length;
    await peer.listen();
    await until(() => requests.length >= before + 2, 'the client to come back', 15_000);
    const second = calls.at(-1) as XdsCall;
    const versions = requests.slice(-2).map(({ initialResourceVersions }) => initialResourceVersions);
    expect(versions).toEqual([{ 'n/p': '1' }, { 'c//Pod/n/a': '1' }]);
    expect(second.metadata.get('authorization')).toEqual(['Bearer second-token']);
    second.write(response(ADDRESS, 'm1', [], ['c//Pod/n/a']));
    second.write(response(POLICY, 'm2', [], ['n/p']));
    await until(() => deltas.length === 4);
    expect(deltas[2]?.removedAddresses).toEqual(['c//Pod/n/a']);
    expect(deltas[3]?.removedPolicies).toEqual(['n/p']);
    expect(state.versions(ADDRESS)).toEqual({});
    expect(state.localWorkload('n', 'a', 'default')).toBeUndefined();
    expect(synced).toBe(1);
  });

  it('asks for a change again that could not be applied', async () => {
    client.start();
    const call = await connected();
    failApply = 'no memory';
    call.write(response(ADDRESS, 'n1', [w1]));
    await until(() => calls.length === 2, 'another stream');
    expect(requests.find(({ responseNonce }) => responseNonce === 'n1')?.errorDetail?.message).toContain('no memory');
    failApply = undefined;
    await until(
      () => requests.filter(({ typeUrl, responseNonce }) => typeUrl === ADDRESS && responseNonce === '').length === 2,
    );
    expect(requests.at(-1)?.initialResourceVersions).toEqual({});
    calls[1]?.write(response(ADDRESS, 'm1', [w1]));
    await until(() => deltas.length === 1);
  });

  it('trusts only the root it was given, which is read anew at each attempt', async () => {
    const other = await Peer.start();
    writeFileSync(join(peer.directory, 'root.pem'), other.authority.bundle);
    client.start();
    await until(() => client.counters.terminations.ConnectionError >= 2, 'refused connections');
    expect(requests).toEqual([]);
    writeFileSync(join(peer.directory, 'root.pem'), peer.authority.bundle);
    await until(() => requests.length === 2, 'a connection', 15_000);
    other.stop();
  });

  it('starts over after bytes that are no response, and refuses a type that it did not ask for', async () => {
    client.start();
    const call = await connected();
    call.write(response('type.googleapis.com/other', 'n1', []));
    await until(() => requests.length === 3);
    expect(requests[2]?.errorDetail?.message).toContain('not asked for');
    call.write(Uint8Array.from([0x0a, 0xff]));
    await until(() => calls.length === 2, 'another stream');
    expect(deltas).toEqual([]);
  });

  it('goes by resource names, also where the key within changes', async () => {
    client.start();
    const call = await connected();
    call.write(response(ADDRESS, 'n1', [{ name: 'alias', value: workload({ uid: 'u1' }) }]));
    call.write(response(ADDRESS, 'n2', [{ name: 'alias', value: workload({ uid: 'u2' }) }]));
    call.write(response(ADDRESS, 'n3', [], ['alias', 'never-seen']));
    await until(() => deltas.length === 3);
    expect(deltas[1]?.removedAddresses).toEqual(['u1']);
    expect(deltas[2]?.removedAddresses).toEqual(['u2', 'never-seen']);
  });
});
