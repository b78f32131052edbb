import { closeSync, fstatSync, mkdtempSync, openSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { connectSeqpacket, listenSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import type { SeqpacketConnection, SeqpacketServer } from '../../src/mesh/seqpacket.ts';
import type { LocalPod } from '../../src/proxy/engine.ts';
import { Pods } from '../../src/proxy/pods.ts';
import { ZdsClient } from '../../src/proxy/zds/client.ts';
import { silent, until } from './proxy-peer.ts';

const { ZdsHello, WorkloadRequest, WorkloadResponse } = istio.workload.zds;
type Request = istio.workload.zds.WorkloadRequest.$Properties;

let directory: string;
let server: SeqpacketServer;
let connections: SeqpacketConnection[];
let packets: Buffer[];
let closed: number;
let added: LocalPod[];
let inodes: number[];
let removed: string[];
let engineFailure: string | undefined;
let identities: Set<string>;
let pods: Pods;
let client: ZdsClient;
let trustDomain: string;

const path = (): string => join(directory, 'zds.sock');
const nsfds = (): number =>
  readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`).startsWith('net:');
    } catch {
      return false;
    }
  }).length;

function listen(): void {
  server = listenSeqpacket(path(), (connection) => {
    connections.push(connection);
    connection.onMessage(({ data }) => packets.push(data));
    connection.onClose(() => closed++);
  });
}

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'proxy-zds-'));
  [connections, packets, closed, added, inodes, removed, engineFailure] = [[], [], 0, [], [], [], undefined];
  identities = new Set();
  trustDomain = 'cluster.local';
  listen();
  pods = new Pods({
    engine: {
      addPod: (pod) => {
        // As the real one: the descriptor is closed in any case.
        const { ino } = fstatSync(pod.netnsFd);
        closeSync(pod.netnsFd);
        if (engineFailure !== undefined) throw new Error(engineFailure);
        added.push(pod);
        inodes.push(ino);
      },
      removePod: (uid) => removed.push(uid),
    },
    certificates: {
      acquire: (identity, uid) => identities.add(`${uid} ${identity}`),
      release: (identity, uid) => identities.delete(`${uid} ${identity}`),
    },
    log: silent,
    trustDomainOf: () => trustDomain,
    retryMs: 50,
  });
  client = new ZdsClient({ path: path(), connect: connectSeqpacket, pods, log: silent });
});
afterEach(() => {
  client.stop();
  pods.stop();
  for (const connection of connections) connection.close();
  server.close();
  rmSync(directory, { recursive: true, force: true });
});

/** Connects and takes the hello. */
async function hello(): Promise<SeqpacketConnection> {
  const seen = packets.length;
  await until(() => packets.length > seen, 'hello');
  expect(ZdsHello.decode(packets[seen] as Buffer).version).toBe(1);
  return connections.at(-1) as SeqpacketConnection;
}

/** Sends one request with a namespace's descriptor or without, and gives the Ack's error. */
async function ask(connection: SeqpacketConnection, request: Request | Buffer, withNetns = false): Promise<string> {
  const seen = packets.length;
  const data = Buffer.isBuffer(request) ? request : WorkloadRequest.encode(request).finish();
  const fd = withNetns ? openSync('/proc/self/ns/net', 'r') : undefined;
  await (fd === undefined ? connection.send(data) : connection.send(data, fd));
  if (fd !== undefined) closeSync(fd);
  await until(() => packets.length > seen, 'an Ack');
  const { ack } = WorkloadResponse.decode(packets[seen] as Buffer);
  if (!ack) throw new Error('no Ack');
  return ack.error ?? '';
}

const add = (uid: string): Request => ({
  add: { uid, workloadInfo: { name: `pod-${uid}`, namespace: 'n', serviceAccount: 'sa' } },
});

describe('ZDS client', () => {
  it('adds, is synced by the snapshot, deletes; each answered by one Ack', async () => {
    client.start();
    const connection = await hello();
    expect(await ask(connection, add('u1'), true)).toBe('');
    expect(added).toMatchObject([{ uid: 'u1', name: 'pod-u1', namespace: 'n', serviceAccount: 'sa' }]);
    expect(inodes[0]).toBe(fstatSync(openSync('/proc/self/ns/net', 'r')).ino);
    expect([...identities]).toEqual(['u1 spiffe://cluster.local/ns/n/sa/sa']);
    expect(client.synced).toBe(false);
    expect(await ask(connection, { snapshotSent: {} })).toBe('');
    expect(client.synced).toBe(true);
    expect(await ask(connection, { del: { uid: 'u1' } })).toBe('');
    expect(await ask(connection, { del: { uid: 'unknown' } })).toBe('');
    expect(removed).toEqual(['u1']);
    expect(identities.size).toBe(0);
    expect(packets).toHaveLength(5);
  });

  it('greets as one that cannot serve until it can, then anew; or stays where it was given pods all the same', async () => {
    const greetings = () => packets.map((packet) => ZdsHello.decode(packet).standby);
    let serves = false;
    client.stop();
    const options = { path: path(), connect: connectSeqpacket, pods, log: silent, canServe: () => serves };
    client = new ZdsClient(options);
    client.start();
    await until(() => packets.length === 1, 'a greeting');
    expect(greetings()).toEqual([true]);
    serves = true;
    client.ready();
    await until(() => packets.length === 2, 'a second greeting');
    expect(greetings()).toEqual([true, false]);
    await until(() => closed === 1, 'the first connection to end');

    client.stop();
    packets.length = 0;
    serves = false;
    client = new ZdsClient(options);
    client.start();
    await until(() => packets.length === 1, 'a greeting');
    const connection = connections.at(-1) as SeqpacketConnection;
    expect(await ask(connection, add('u1'), true)).toBe('');
    serves = true;
    client.ready();
    expect(await ask(connection, { snapshotSent: {} })).toBe('');
    expect(client.synced).toBe(true);
  });

  it('keeps pods while the agent is away and stops those that the next snapshot does not name', async () => {
    client.start();
    const first = await hello();
    for (const uid of ['u1', 'u2', 'u3']) await ask(first, add(uid), true);
    await ask(first, { snapshotSent: {} });
    server.close();
    first.close();
    await until(() => !client.synced, 'the loss to be seen');
    expect(removed).toEqual([]);
    listen();
    const second = await hello();
    expect(second).not.toBe(first);
    expect(await ask(second, { keep: { uid: 'u1' } })).toBe('');
    expect(await ask(second, add('u2'), true)).toBe('');
    expect(await ask(second, { keep: { uid: 'u3' } })).toBe('');
    expect(await ask(second, { del: { uid: 'u3' } })).toBe('');
    expect(removed).toEqual([]);
    expect(await ask(second, { snapshotSent: {} })).toBe('');
    expect(removed).toEqual(['u3']);
    expect(pods.uids()).toEqual(['u1', 'u2']);
  });

  it('says when listeners cannot be opened and tries again until they are', async () => {
    const before = nsfds();
    client.start();
    const connection = await hello();
    engineFailure = 'bind [::]:15008: EPERM';
    expect(await ask(connection, add('u1'), true)).toContain('EPERM');
    expect(pods.pending).toMatchObject([{ pod: { uid: 'u1' }, error: 'bind [::]:15008: EPERM' }]);
    expect(await ask(connection, { snapshotSent: {} })).toBe('');
    expect(removed).toEqual([]);
    engineFailure = undefined;
    await until(() => added.length === 1, 'another attempt');
    expect(pods.pending).toEqual([]);
    expect(pods.active).toBe(1);
    expect(nsfds()).toBe(before);
  });

  it('gives up a failed pod that is deleted, and leaves no descriptor', async () => {
    const before = nsfds();
    client.start();
    const connection = await hello();
    engineFailure = 'no';
    await ask(connection, add('u1'), true);
    await ask(connection, { snapshotSent: {} });
    await ask(connection, { del: { uid: 'u1' } });
    engineFailure = undefined;
    await new Promise((resolve) => setTimeout(resolve, 150));
    expect(added).toEqual([]);
    expect(nsfds()).toBe(before);
  });

  it.each<[string, Request | Buffer, boolean, RegExp]>([
    ['Add without a descriptor', add('u'), false, /without the descriptor/],
    ['Add without workload_info', { add: { uid: 'u' } }, true, /without workload_info/],
    ['Add without uid', { add: { workloadInfo: { name: 'a', namespace: 'n' } } }, true, /without uid/],
    ['Add without name', { add: { uid: 'u', workloadInfo: { namespace: 'n' } } }, true, /no name/],
    ['Keep with a descriptor', { keep: { uid: 'u' } }, true, /other than Add/],
    ['a message of a newer kind', Buffer.from([0x7a, 0x00]), false, /unknown kind/],
    ['bytes that are no message', Buffer.from([0x0a, 0xff]), false, /cannot be decoded/],
  ])('refuses %s, ends the connection and comes again', async (_, request, withNetns, reason) => {
    const before = nsfds();
    client.start();
    const connection = await hello();
    expect(await ask(connection, request, withNetns)).toMatch(reason);
    await until(() => closed === 1, 'the end of the connection');
    await until(() => connections.length === 2, 'another connection');
    expect(added).toEqual([]);
    expect(nsfds()).toBe(before);
  });

  it.each<[string, Request]>([
    ['Keep', { keep: { uid: 'u' } }],
    ['SnapshotSent', { snapshotSent: {} }],
  ])('refuses %s after the snapshot', async (_, request) => {
    client.start();
    const connection = await hello();
    await ask(connection, { snapshotSent: {} });
    expect(await ask(connection, request)).toMatch(/snapshot/i);
    await until(() => connections.length === 2, 'another connection');
  });

  it('changes the identity of a pod when its workload tells another trust domain', async () => {
    client.start();
    const connection = await hello();
    await ask(connection, add('u1'), true);
    trustDomain = 'other';
    pods.refreshIdentities();
    expect([...identities]).toEqual(['u1 spiffe://other/ns/n/sa/sa']);
  });
});
