/** SOCK_SEQPACKET sockets by the addon native/seqpacket: loads it and does what the interface of seqpacket.ts promises. */
import { closeSync, lstatSync, mkdirSync, unlinkSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname } from 'node:path';
import type { PeerCredentials, SeqpacketConnection, SeqpacketMessage, SeqpacketServer } from './seqpacket.js';

interface NativeConnection {
  readonly peer: PeerCredentials;
  start(callback: (event: 'readable' | 'writable' | 'peerExit') => void): void;
  send(data: Uint8Array, fd: number): boolean;
  receive(): SeqpacketMessage | null | undefined;
  wantWritable(wanted: boolean): void;
  peerAlive(): boolean;
  close(keepProcess: boolean): void;
}

interface NativeListener {
  start(callback: () => void): void;
  pause(paused: boolean): void;
  accept(): NativeConnection | null;
  close(): void;
}

interface Addon {
  readonly Connection: new (path: string) => NativeConnection;
  readonly Listener: new (path: string, mode: number, backlog: number) => NativeListener;
  readonly maxMessage: number;
}

let loaded: Addon | undefined;

/** Loads the addon on first use. @throws Error that names the file and says how to build it */
function addon(): Addon {
  if (loaded !== undefined) return loaded;
  const path = new URL('../../native/build/Release/seqpacket.node', import.meta.url).pathname;
  try {
    loaded = createRequire(import.meta.url)(path) as Addon;
  } catch (error) {
    throw new Error(
      `loading the seqpacket addon ${path} failed: ${(error as Error).message}; build it: npm run build`,
      {
        cause: error,
      },
    );
  }
  return loaded;
}

/** Messages that may wait for a slow reader; ZDS, which answers each message, never has more than one. */
const MAX_WAITING = 64;
/** Messages taken in one turn of the event loop. */
const MESSAGES_PER_TURN = 32;
const BACKLOG = 16;
const SOCKET_MODE = 0o600;
/** After a failure to accept, such as too many open files. */
const ACCEPT_RETRY_MS = 1000;

interface Waiting {
  readonly data: Uint8Array;
  readonly fd: number;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

class Connection implements SeqpacketConnection {
  readonly peer: PeerCredentials;
  readonly #native: NativeConnection;
  readonly #waiting: Waiting[] = [];
  #onMessage: ((message: SeqpacketMessage) => void) | undefined;
  #onClose: ((error?: Error) => void) | undefined;
  #onPeerExit: (() => void) | undefined;
  #peerGone = false;
  #closed = false;
  #closeError: Error | undefined;

  constructor(native: NativeConnection) {
    this.#native = native;
    this.peer = native.peer;
    // In the next turn, so that whoever gets the connection can say first what it wants to hear.
    setImmediate(() => {
      if (this.#closed) return;
      native.start((event) => this.#event(event));
      if (this.#waiting.length > 0) this.#flush();
    });
  }

  send(data: Uint8Array, fd = -1): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#closed) reject(new Error('the connection is closed'));
      else if (data.length === 0 || data.length > addon().maxMessage) {
        reject(new RangeError(`a message has 1 to ${addon().maxMessage} bytes, not ${data.length}`));
      } else if (this.#waiting.length >= MAX_WAITING) reject(new Error('too many messages wait for the other side'));
      else {
        this.#waiting.push({ data, fd, resolve, reject });
        if (this.#waiting.length === 1) this.#flush();
      }
    });
  }

  onMessage(listener: (message: SeqpacketMessage) => void): void {
    this.#onMessage = listener;
  }

  onClose(listener: (error?: Error) => void): void {
    this.#onClose = listener;
    if (this.#closed) setImmediate(() => listener(this.#closeError));
  }

  onPeerExit(listener: () => void): void {
    this.#onPeerExit = listener;
    if (this.#peerGone) setImmediate(listener);
  }

  peerAlive(): boolean {
    return !this.#peerGone && this.#native.peerAlive();
  }

  close(): void {
    this.#end(undefined);
  }

  #event(event: 'readable' | 'writable' | 'peerExit'): void {
    if (event === 'readable') this.#read();
    else if (event === 'writable') this.#flush();
    else {
      this.#peerGone = true;
      // The socket ends no later than its process does; what it said last is read first.
      for (let reads = 0; !this.#closed && reads < MAX_WAITING; reads++) this.#read();
      this.#end(undefined);
      this.#onPeerExit?.();
    }
  }

  #read(): void {
    try {
      for (let count = 0; count < MESSAGES_PER_TURN && !this.#closed; count++) {
        const message = this.#native.receive();
        if (message === null) return;
        if (message === undefined) this.#end(undefined);
        else if (this.#onMessage !== undefined) this.#onMessage(message);
        else for (const fd of message.fds) closeSync(fd);
      }
    } catch (error) {
      if (!isSystemError(error)) throw error;
      this.#end(error);
    }
  }

  #flush(): void {
    try {
      for (let first = this.#waiting[0]; first !== undefined && !this.#closed; first = this.#waiting[0]) {
        if (!this.#native.send(first.data, first.fd)) {
          this.#native.wantWritable(true);
          return;
        }
        this.#waiting.shift();
        first.resolve();
      }
      if (!this.#closed) this.#native.wantWritable(false);
    } catch (error) {
      if (!isSystemError(error)) throw error;
      this.#end(error);
    }
  }

  #end(error: Error | undefined): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#closeError = error;
    this.#native.close(this.#onPeerExit !== undefined && !this.#peerGone);
    const gone = error ?? new Error('the connection was closed');
    for (const { reject } of this.#waiting.splice(0)) reject(gone);
    this.#onClose?.(error);
  }
}

function isSystemError(error: unknown): error is NodeJS.ErrnoException {
  return error instanceof Error && 'syscall' in error;
}

/**
 * Connects to a listening socket; does not wait.
 * @throws Error with `code`: ENOENT or ECONNREFUSED when nobody listens, EAGAIN when too many wait there
 */
export function connectSeqpacket(path: string): SeqpacketConnection {
  return new Connection(new (addon().Connection)(path));
}

export interface ListenOptions {
  /** Connections accepted in a second; the rest wait. Default: no limit. */
  readonly acceptsPerSecond?: number;
  /** A connection could not be accepted; others will be. */
  readonly onError?: (error: Error) => void;
}

/**
 * Listens at a path of mode 0600, whose directory is made if missing. A socket file on which nobody listens is removed first.
 * @throws Error with `code` EADDRINUSE when somebody listens there, or what the system said
 */
export function listenSeqpacket(
  path: string,
  onConnection: (connection: SeqpacketConnection) => void,
  options: ListenOptions = {},
): SeqpacketServer {
  mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
  removeStaleSocket(path);
  const native = new (addon().Listener)(path, SOCKET_MODE, BACKLOG);
  const own = lstatSync(path, { bigint: true });
  const limit = options.acceptsPerSecond ?? Number.POSITIVE_INFINITY;
  let accepted: number[] = [];
  let timer: NodeJS.Timeout | undefined;

  const rest = (ms: number): void => {
    native.pause(true);
    timer = setTimeout(() => native.pause(false), ms);
  };
  native.start(() => {
    const now = performance.now();
    accepted = accepted.filter((time) => now - time < 1000);
    const [oldest] = accepted;
    if (oldest !== undefined && accepted.length >= limit) {
      rest(oldest + 1000 - now);
      return;
    }
    try {
      const connection = native.accept();
      if (connection === null) return;
      accepted.push(now);
      onConnection(new Connection(connection));
    } catch (error) {
      if (!isSystemError(error)) throw error;
      // A peer that has ended already is nobody's failure; anything else, such as no descriptors, takes time to pass.
      if (error.code !== 'ESRCH') rest(ACCEPT_RETRY_MS);
      options.onError?.(error);
    }
  });
  return {
    close() {
      clearTimeout(timer);
      native.close();
      try {
        const now = lstatSync(path, { bigint: true });
        if (now.ino === own.ino && now.dev === own.dev) unlinkSync(path);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      }
    },
  };
}

/** Removes a socket file that a dead process left. */
export function removeStaleSocket(path: string): void {
  const there = lstatSync(path, { throwIfNoEntry: false });
  if (there === undefined) return;
  if (!there.isSocket()) {
    throw Object.assign(new Error(`${path} is there and is no socket; remove it or choose another path`), {
      code: 'EEXIST',
    });
  }
  try {
    new (addon().Connection)(path).close(false);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ECONNREFUSED') {
      unlinkSync(path);
      return;
    }
    if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
  }
  throw Object.assign(new Error(`${path}: another process listens there; stop it or choose another path`), {
    code: 'EADDRINUSE',
  });
}
