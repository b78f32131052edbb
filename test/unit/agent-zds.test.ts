import { spawn } from 'node:child_process';
import { closeSync, fstatSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { ProxyRefusal, type ZdsWorkload } from '../../src/agent/zds-connection.ts';
import { NoProxy, ZdsServer } from '../../src/agent/zds-server.ts';
import { connectSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import { istio } from '../../src/mesh/proto/generated.js';
import type { SeqpacketConnection } from '../../src/mesh/seqpacket.ts';

const { WorkloadRequest, WorkloadResponse, ZdsHello } = istio.workload.zds;
const HELLO = ZdsHello.encode({ version: 1 }).finish();
const ack = (error = '') => WorkloadResponse.encode({ ack: { error } }).finish();

let directory: string;
let path: string;
let server: ZdsServer;
let workloads: ZdsWorkload[];
let events: string[];
let fd: number;
const clients: Client[] = [];

/** A proxy: answers each request, unless told otherwise. */
class Client {
  readonly socket: SeqpacketConnection;
  readonly got: string[] = [];
  readonly contents: string[] = [];
  closed = false;
  answer: (what: string) => Uint8Array | undefined = () => ack();

  constructor() {
    this.socket = connectSeqpacket(path);
    clients.push(this);
    this.socket.onClose(() => {
      this.closed = true;
    });
    this.socket.onMessage(({ data, fds }) => {
      const request = WorkloadRequest.decode(data);
      const uid = request.add?.uid ?? request.del?.uid ?? request.keep?.uid;
      const kind =
        ['add', 'del', 'keep', 'snapshotSent'].find((name) => name in request && request[name as 'add']) ?? '?';
      this.got.push(uid ? `${kind} ${uid}` : kind);
      for (const each of fds) {
        this.contents.push(
          `${request.add?.workloadInfo?.serviceAccount} ${readFileSync(`/proc/self/fd/${each}`, 'utf8')}`,
        );
        closeSync(each);
      }
      const reply = this.answer(this.got.at(-1) ?? '');
      if (reply !== undefined) void this.socket.send(reply);
    });
  }
  hello(greeting: Uint8Array = HELLO): this {
    void this.socket.send(greeting);
    return this;
  }
}

const workload = (uid: string, netnsFd: () => number | undefined = () => fd): ZdsWorkload => ({
  uid,
  name: uid,
  namespace: 'team',
  serviceAccount: `sa-${uid}`,
  netnsFd,
});

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebbtide-zds-'));
  path = join(directory, 'ztunnel.sock');
  writeFileSync(join(directory, 'netns'), 'its netns');
  fd = openSync(join(directory, 'netns'), 'r');
  workloads = [];
  events = [];
  server = new ZdsServer(path, pino({ level: 'silent' }), {
    workloads: () => workloads,
    misplaced: () => undefined,
    trustProxy: (pid) => events.push(`trust ${pid}`),
    distrustProxy: (pid) => events.push(`distrust ${pid}`),
  });
  server.listen();
});
afterEach(() => {
  vi.useRealTimers();
  for (const { socket } of clients.splice(0)) socket.close();
  server.close();
  closeSync(fd);
  rmSync(directory, { recursive: true });
});

describe('a proxy that behaves', () => {
  it('is trusted, then told of all pods with their descriptors, then that this is all', async () => {
    workloads = [workload('a'), workload('b')];
    const client = new Client();
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(client.got).toEqual([]);
    expect(events).toEqual([]);
    client.hello();
    await vi.waitFor(() => expect(client.got).toEqual(['add a', 'add b', 'snapshotSent']));
    expect(events).toEqual([`trust ${process.pid}`]);
    expect(client.contents).toEqual(['sa-a its netns', 'sa-b its netns']);
    expect(server.view('a')).toEqual({ serves: true });
  });

  it('is told to keep what has no descriptor here', async () => {
    workloads = [workload('a', () => undefined)];
    const client = new Client().hello();
    await vi.waitFor(() => expect(client.got).toEqual(['keep a', 'snapshotSent']));
    expect(server.view('a').serves).toBe(false);
  });

  it('gets the next request only after its answer', async () => {
    workloads = [workload('a'), workload('b')];
    const client = new Client();
    client.answer = () => undefined;
    client.hello();
    await vi.waitFor(() => expect(client.got).toEqual(['add a']));
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(client.got).toEqual(['add a']);
    client.answer = () => ack();
    void client.socket.send(ack());
    await vi.waitFor(() => expect(client.got).toEqual(['add a', 'add b', 'snapshotSent']));
  });

  it('may refuse a pod, which is told, and goes on', async () => {
    const client = new Client().hello();
    await vi.waitFor(() => expect(client.got).toEqual(['snapshotSent']));
    client.answer = (what) => ack(what === 'add bad' ? 'no room' : '');
    await expect(server.add(workload('bad'))).rejects.toThrow(ProxyRefusal);
    expect(server.view('bad')).toEqual({ serves: false, reason: 'the proxy cannot serve it: no room' });
    await server.add(workload('good'));
    expect(client.closed).toBe(false);
    expect(() => fstatSync(fd)).not.toThrow();
  });

  it('is not told of a pod that was let go while it waited its turn', async () => {
    const client = new Client();
    client.answer = () => undefined;
    let gone = false;
    workloads = [workload('a'), workload('b', () => (gone ? undefined : fd))];
    client.hello();
    await vi.waitFor(() => expect(client.got).toEqual(['add a']));
    gone = true;
    client.answer = () => ack();
    void client.socket.send(ack());
    await vi.waitFor(() => expect(client.got).toEqual(['add a', 'snapshotSent']));
  });
});

describe('several proxies', () => {
  it('the newest gets Add, all get Del, and the one before takes over what the newest had', async () => {
    const old = new Client().hello();
    await vi.waitFor(() => expect(old.got).toEqual(['snapshotSent']));
    const young = new Client().hello();
    await vi.waitFor(() => expect(young.got).toEqual(['snapshotSent']));
    workloads = [workload('a')];
    await server.add(workload('a'));
    expect([old.got.length, young.got.at(-1)]).toEqual([1, 'add a']);
    await server.del('x');
    expect([old.got.at(-1), young.got.at(-1)]).toEqual(['del x', 'del x']);
    young.socket.close();
    await vi.waitFor(() => expect(old.got.at(-1)).toBe('add a'));
    expect(server.view('a')).toEqual({ serves: true });
  });

  it('an Add under way when the newest goes is made to the one before', async () => {
    const old = new Client().hello();
    await vi.waitFor(() => expect(old.got).toEqual(['snapshotSent']));
    const young = new Client().hello();
    await vi.waitFor(() => expect(young.got).toEqual(['snapshotSent']));
    young.answer = () => undefined;
    const added = server.add(workload('a'));
    await vi.waitFor(() => expect(young.got.at(-1)).toBe('add a'));
    young.socket.close();
    await added;
    expect(old.got.at(-1)).toBe('add a');
  });

  it('one that cannot serve yet is left alone while another serves, and greets again when it can', async () => {
    const standby = ZdsHello.encode({ version: 1, standby: true }).finish();
    workloads = [workload('a')];
    const old = new Client().hello();
    await vi.waitFor(() => expect(old.got).toEqual(['add a', 'snapshotSent']));
    const next = new Client().hello(standby);
    await vi.waitFor(() => expect(events).toHaveLength(2));
    await server.add(workload('b'));
    expect(old.got).toEqual(['add a', 'snapshotSent', 'add b']);
    expect(next.got).toEqual([]);
    expect(server.proxies()).toHaveLength(1);
    next.socket.close();
    const again = new Client().hello();
    await vi.waitFor(() => expect(again.got).toEqual(['add a', 'snapshotSent']));
    await server.add(workload('c'));
    expect(again.got.at(-1)).toBe('add c');
  });

  it('one that cannot serve yet is told of the pods where it is the only one, or becomes it', async () => {
    const standby = ZdsHello.encode({ version: 1, standby: true }).finish();
    workloads = [workload('a')];
    const first = new Client().hello(standby);
    await vi.waitFor(() => expect(first.got).toEqual(['add a', 'snapshotSent']));
    const second = new Client().hello(standby);
    await vi.waitFor(() => expect(events).toHaveLength(2));
    expect(second.got).toEqual([]);
    first.socket.close();
    await vi.waitFor(() => expect(second.got).toEqual(['add a', 'snapshotSent']));
    expect(server.view('a')).toEqual({ serves: true });
  });

  it('none: Add says so', async () => {
    await expect(server.add(workload('a'))).rejects.toThrow(NoProxy);
    expect(server.view('a')).toEqual({ serves: false, reason: 'waiting for proxy' });
    await server.del('a');
  });
});

describe('trust', () => {
  it('lasts as long as the process, not as the socket', async () => {
    const script = `
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); s.send(b'\\x08\\x01')
s.recv(2048); s.send(b'\\x0a\\x00'); sys.stdin.readline(); s.close(); sys.stdin.readline()`;
    const child = spawn('python3', ['-c', script, path], { stdio: ['pipe', 'inherit', 'inherit'] });
    try {
      await vi.waitFor(() => expect(server.proxies()).toEqual([child.pid]), { timeout: 5000 });
      child.stdin.write('\n');
      await vi.waitFor(() => expect(server.proxies()).toEqual([]));
      await new Promise((resolve) => setTimeout(resolve, 50));
      expect(events).toEqual([`trust ${child.pid}`]);
      child.stdin.write('\n');
      await vi.waitFor(() => expect(events).toEqual([`trust ${child.pid}`, `distrust ${child.pid}`]));
    } finally {
      child.kill('SIGKILL');
    }
  });
});

describe('a proxy that misbehaves is disconnected, and untrusted before it has greeted:', () => {
  const bad: readonly (readonly [string, Uint8Array])[] = [
    [
      'a greeting of another version',
      ZdsHello.encode({ version: 0 }).finish().length ? new Uint8Array([8, 7]) : new Uint8Array([8, 0]),
    ],
    ['a greeting without a version', new Uint8Array([0x12, 0])],
    ['garbage', new Uint8Array([0xff, 0xff, 0xff])],
    ['the longest message there is', new Uint8Array(1024).fill(0xff)],
  ];
  it.each(bad)('%s', async (_, data) => {
    const client = new Client();
    void client.socket.send(data);
    await vi.waitFor(() => expect(client.closed).toBe(true));
    expect(events).toEqual([]);
  });

  it('a descriptor with the greeting', async () => {
    const client = new Client();
    void client.socket.send(HELLO, fd);
    await vi.waitFor(() => expect(client.closed).toBe(true));
    expect(events).toEqual([]);
  });

  it.each([
    ['an oversized message', `s.send(b'x' * 1025)`],
    [
      'two descriptors',
      `s.sendmsg([b'\\x08\\x01'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1]))])`,
    ],
    ['no greeting but the end', 's.shutdown(socket.SHUT_RDWR)'],
  ])('%s', async (_, script) => {
    const program = `import socket, sys, array\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n${script}\nsys.exit(0 if s.recv(10) == b'' else 1)`;
    const child = spawn('python3', ['-c', program, path], { stdio: 'inherit' });
    expect(await new Promise((resolve) => child.once('exit', resolve))).toBe(0);
    expect(events).toEqual([]);
  });

  it.each([
    ['an Ack that nothing was asked for', ack()],
    ['an answer without an Ack', new Uint8Array([0x12, 0])],
    ['garbage after the greeting', new Uint8Array([0x0a, 0xff])],
  ])('%s', async (_, data) => {
    const client = new Client().hello();
    await vi.waitFor(() => expect(client.got).toEqual(['snapshotSent']));
    await vi.waitFor(() => expect(server.proxies()).toHaveLength(1));
    void client.socket.send(data);
    await vi.waitFor(() => expect(client.closed).toBe(true));
    expect(server.proxies()).toEqual([]);
  });

  it('no greeting within 5 s', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    const client = new Client();
    await turns();
    await vi.advanceTimersByTimeAsync(4900);
    await turns();
    expect(client.closed).toBe(false);
    await vi.advanceTimersByTimeAsync(200);
    await turns();
    expect(client.closed).toBe(true);
  });

  it('no answer within 5 s, which fails what was asked', async () => {
    const client = new Client().hello();
    await vi.waitFor(() => expect(client.got).toEqual(['snapshotSent']));
    await vi.waitFor(() => expect(server.proxies()).toHaveLength(1));
    await turns();
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    client.answer = () => undefined;
    const added = server.add(workload('a'));
    const failed = expect(added).rejects.toThrow(NoProxy);
    await turns();
    expect(client.got.at(-1)).toBe('add a');
    await vi.advanceTimersByTimeAsync(5100);
    await turns();
    expect(client.closed).toBe(true);
    await failed;
  });
});

/** Lets the event loop turn while its timers are not real. */
async function turns(): Promise<void> {
  for (let n = 0; n < 50; n++) await new Promise((resolve) => setImmediate(resolve));
}
