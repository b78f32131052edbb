import { execFileSync, spawn } from 'node:child_process';
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { connectSeqpacket, listenSeqpacket } from '../../src/mesh/native-seqpacket.ts';
import type { SeqpacketConnection, SeqpacketMessage, SeqpacketServer } from '../../src/mesh/seqpacket.ts';

let directory: string;
let path: string;
let server: SeqpacketServer | undefined;
let opened: SeqpacketConnection[];

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebbtide-seqpacket-'));
  path = join(directory, 'sub', 's.sock');
  opened = [];
});
afterEach(() => {
  for (const connection of opened) connection.close();
  server?.close();
  server = undefined;
  rmSync(directory, { recursive: true, force: true });
});

function connect(): SeqpacketConnection {
  const connection = connectSeqpacket(path);
  opened.push(connection);
  return connection;
}

/** Listens and resolves with the server's side of the first connection. */
function accepting(): Promise<SeqpacketConnection> {
  return new Promise((resolve) => {
    server = listenSeqpacket(path, (connection) => {
      opened.push(connection);
      resolve(connection);
    });
  });
}

async function pair(): Promise<[SeqpacketConnection, SeqpacketConnection]> {
  const accepted = accepting();
  const client = connect();
  return [client, await accepted];
}

const nextMessage = (connection: SeqpacketConnection) =>
  new Promise<SeqpacketMessage>((resolve) => connection.onMessage(resolve));
const closed = (connection: SeqpacketConnection) =>
  new Promise<Error | undefined>((resolve) => connection.onClose((error) => resolve(error)));
const descriptors = () => readdirSync('/proc/self/fd').length;

/** A process that connects, sends what Python text says, and lives until its input ends. */
function python(script: string) {
  const start = `import socket, sys, array, os\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])\n`;
  return spawn('python3', ['-c', `${start}${script}\nsys.stdin.read()`, path], {
    stdio: ['pipe', 'inherit', 'inherit'],
  });
}

describe('messages', () => {
  it('come whole and in order, both ways', async () => {
    const [client, other] = await pair();
    const got: string[] = [];
    other.onMessage(({ data, truncated, fds }) => {
      expect(truncated).toBe(false);
      expect(fds).toEqual([]);
      got.push(data.toString());
    });
    for (let n = 0; n < 50; n++) void client.send(Buffer.from(`message ${n}`));
    await vi.waitFor(() => expect(got).toHaveLength(50));
    expect(got).toEqual(Array.from({ length: 50 }, (_, n) => `message ${n}`));
    const answer = nextMessage(client);
    await other.send(Buffer.alloc(1024, 7));
    expect((await answer).data).toEqual(Buffer.alloc(1024, 7));
  });

  it('carry a descriptor, which is closed on exec and is the receiver’s own', async () => {
    const [client, other] = await pair();
    const file = join(directory, 'file');
    writeFileSync(file, 'content');
    const fd = openSync(file, 'r');
    const message = nextMessage(other);
    await client.send(Buffer.from('x'), fd);
    closeSync(fd);
    const [received = -1] = (await message).fds;
    try {
      expect(readFileSync(received, 'utf8')).toBe('content');
      expect(readFileSync(`/proc/self/fdinfo/${received}`, 'utf8')).toMatch(/flags:\s+02\d{6}/);
    } finally {
      closeSync(received);
    }
    expect(() => fstatSync(received)).toThrow(/EBADF/);
  });

  it('are not sent empty or oversized', async () => {
    const [client] = await pair();
    await expect(client.send(Buffer.alloc(0))).rejects.toThrow(/1 to 1024/);
    await expect(client.send(Buffer.alloc(1025))).rejects.toThrow(/1 to 1024/);
  });

  it('with a bad descriptor end the connection with the system’s error', async () => {
    const [client] = await pair();
    await expect(client.send(Buffer.from('x'), 1 << 20)).rejects.toThrow(/EBADF/);
  });

  it('that are too long arrive marked as truncated', async () => {
    const accepted = accepting();
    const child = python(`s.send(b'y' * 1025)`);
    try {
      const message = await nextMessage(await accepted);
      expect(message.truncated).toBe(true);
      expect(message.data).toHaveLength(1024);
    } finally {
      child.stdin.end();
    }
  });

  it('with too many descriptors arrive marked as truncated, and none is lost', async () => {
    const accepted = accepting();
    const child = python(`s.sendmsg([b'z'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 9))])`);
    try {
      const connection = await accepted;
      const before = descriptors();
      const message = await nextMessage(connection);
      expect(message.truncated).toBe(true);
      for (const fd of message.fds) closeSync(fd);
      expect(descriptors()).toBe(before);
    } finally {
      child.stdin.end();
    }
  });

  it('wait for a reader that is slow, a bounded number of them', async () => {
    const accepted = accepting();
    // Stops reading until its input ends.
    const child = python('sys.stdin.readline()\nwhile s.recv(2048): pass');
    const connection = await accepted;
    const sends: Promise<void>[] = [];
    for (let n = 0; n < 1000; n++) sends.push(connection.send(Buffer.alloc(1024)));
    const settled = Promise.allSettled(sends);
    child.stdin.write('\n');
    const results = await settled;
    const refused = results.filter(({ status }) => status === 'rejected');
    expect(refused.length).toBeGreaterThan(0);
    expect(results.slice(0, 64).every(({ status }) => status === 'fulfilled')).toBe(true);
    await connection.send(Buffer.from('again'));
    child.stdin.end();
    connection.close();
  });
});

describe('the other side', () => {
  it('is known by process, user and group', async () => {
    const [client, other] = await pair();
    const self = { pid: process.pid, uid: process.getuid?.(), gid: process.getgid?.() };
    expect(other.peer).toEqual(self);
    expect(client.peer).toEqual(self);
  });

  it('that closes is told once, to both what waits and what listens', async () => {
    const [client, other] = await pair();
    let closes = 0;
    other.onMessage(() => {});
    other.onClose(() => closes++);
    const end = closed(client);
    client.close();
    expect(await end).toBeUndefined();
    await vi.waitFor(() => expect(closes).toBe(1));
    await expect(other.send(Buffer.from('x'))).rejects.toThrow(/closed/);
    await expect(client.send(Buffer.from('x'))).rejects.toThrow(/closed/);
  });

  it('that ends as a process is told after its socket, however it ends', async () => {
    const accepted = accepting();
    const child = python('');
    const connection = await accepted;
    expect(connection.peer.pid).toBe(child.pid);
    const events: string[] = [];
    connection.onMessage(() => {});
    connection.onClose(() => events.push('close'));
    connection.onPeerExit(() => events.push('exit'));
    child.kill('SIGKILL');
    await vi.waitFor(() => expect(events).toEqual(['close', 'exit']));
  });

  it('is watched on after its socket has closed', async () => {
    const accepted = accepting();
    const child = python('s.close()');
    const connection = await accepted;
    const events: string[] = [];
    connection.onMessage(() => {});
    connection.onPeerExit(() => events.push('exit'));
    connection.onClose(() => events.push('close'));
    await vi.waitFor(() => expect(events).toEqual(['close']));
    await new Promise((resolve) => setTimeout(resolve, 50));
    expect(events).toEqual(['close']);
    child.stdin.end();
    await vi.waitFor(() => expect(events).toEqual(['close', 'exit']));
  });

  it('leaves no descriptor behind', async () => {
    const before = descriptors();
    const accepted = accepting();
    const client = connect();
    const other = await accepted;
    client.close();
    other.close();
    server?.close();
    await vi.waitFor(() => expect(descriptors()).toBe(before));
  });
});

describe('listening', () => {
  it('makes a file of mode 0600 and removes it at the end', () => {
    server = listenSeqpacket(path, () => {});
    expect(statSync(path).mode & 0o777).toBe(0o600);
    server.close();
    expect(statSync(path, { throwIfNoEntry: false })).toBeUndefined();
  });

  it('replaces a file that a dead process left, and no other', async () => {
    server = listenSeqpacket(path, () => {});
    expect(() => listenSeqpacket(path, () => {})).toThrow(/another process listens/);
    server.close();
    const stale = `import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\ns.bind(sys.argv[1])\ns.listen(1)`;
    execFileSync('python3', ['-c', stale, path]);
    expect(statSync(path).isSocket()).toBe(true);
    const [client, other] = await pair();
    client.close();
    other.close();
    const file = join(directory, 'plain');
    writeFileSync(file, 'precious');
    expect(() => listenSeqpacket(file, () => {})).toThrow(/no socket/);
    expect(readFileSync(file, 'utf8')).toBe('precious');
  });

  it('says what is wrong with a path', () => {
    expect(() => connectSeqpacket(path)).toThrow(/ENOENT/);
    expect(() => connectSeqpacket(`/${'x'.repeat(120)}`)).toThrow(/ENAMETOOLONG/);
    expect(() => connectSeqpacket('\0abstract')).toThrow(/EINVAL/);
  });

  it('accepts no more connections a second than told', async () => {
    let accepted = 0;
    server = listenSeqpacket(
      path,
      (connection) => {
        accepted++;
        opened.push(connection);
      },
      { acceptsPerSecond: 3 },
    );
    for (let n = 0; n < 6; n++) connect();
    await new Promise((resolve) => setTimeout(resolve, 400));
    expect(accepted).toBe(3);
    await vi.waitFor(() => expect(accepted).toBe(6), { timeout: 3000 });
  });
});

describe('the end of the program', () => {
  const module = new URL('../../src/mesh/native-seqpacket.ts', import.meta.url).href;
  const program = (end: string) => `
    import { createRequire, register, registerHooks } from 'node:module';
    registerHooks({ resolve: (name, context, next) => next(name.startsWith('.') ? name.replace(/\\.js$/, '.ts') : name, context) });
    const { connectSeqpacket, listenSeqpacket } = await import(${JSON.stringify(module)});
    listenSeqpacket(PATH, (connection) => { connection.onPeerExit(() => {}); connection.onMessage(() => {}); });
    connectSeqpacket(PATH).onMessage(() => {});
    await new Promise((resolve) => setTimeout(resolve, 50));
    ${end}
  `;

  it.each([
    ['process.exit', 'process.exit(0)', 0],
    ['an uncaught exception', 'setTimeout(() => { throw new Error("wanted") })', 1],
    [
      'an uncaught exception in a callback',
      'connectSeqpacket(PATH).onMessage(() => {}); listenSeqpacket(PATH + "2", () => { throw new Error("wanted") }); connectSeqpacket(PATH + "2")',
      1,
    ],
  ])('by %s is clean', async (_, end, code) => {
    const source = program(end).replaceAll('PATH', JSON.stringify(join(directory, 'e.sock')));
    const child = spawn(process.execPath, ['--input-type=module', '-e', source], { stdio: 'ignore' });
    expect(await new Promise((resolve) => child.once('exit', (status, signal) => resolve(signal ?? status)))).toBe(
      code,
    );
  });

  it('of a worker thread with open sockets is clean', async () => {
    for (let n = 0; n < 5; n++) {
      const source = program('postMessageDone()').replaceAll('PATH', JSON.stringify(join(directory, `w${n}.sock`)));
      const worker = new Worker(
        `import('node:worker_threads').then(({ parentPort }) => { globalThis.postMessageDone = () => parentPort.postMessage('up');
          return import('data:text/javascript,' + encodeURIComponent(${JSON.stringify(source)})); });`,
        { eval: true },
      );
      await new Promise((resolve, reject) => {
        worker.once('message', resolve);
        worker.once('error', reject);
      });
      await worker.terminate();
    }
  });
});
