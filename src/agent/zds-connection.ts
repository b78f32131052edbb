/** One proxy on the ZDS socket: its greeting, and one request at a time, each answered by one Ack. */
import { closeSync } from 'node:fs';
import { istio } from '../mesh/proto/generated.js';
import type { SeqpacketConnection, SeqpacketMessage } from '../mesh/seqpacket.js';

const { Version, WorkloadRequest, WorkloadResponse, ZdsHello } = istio.workload.zds;

/** A pod as ZDS tells of it. */
export interface ZdsWorkload {
  readonly uid: string;
  readonly name: string;
  readonly namespace: string;
  readonly serviceAccount: string;
  /** Descriptor of the pod's network namespace when its turn comes; undefined once the pod is gone or where it is unknown. */
  netnsFd(): number | undefined;
}

/** The proxy answered a request with an error: it cannot serve the pod now, and goes on trying by itself. */
export class ProxyRefusal extends Error {
  override readonly name = 'ProxyRefusal';
}

/** The connection ended before the request was answered. */
export class ConnectionLost extends Error {
  override readonly name = 'ConnectionLost';
}

/** Istio's node agent waits as long for the greeting and for each answer. */
export const ANSWER_DEADLINE_MS = 5000;

interface Request {
  /** undefined: nothing to send any more. */
  encode(): { readonly data: Uint8Array; readonly fd?: number } | undefined;
  done(): void;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

export interface ZdsConnectionEvents {
  /** The proxy has greeted; requests may be made. */
  ready(): void;
  /** The connection has ended; the reason is a protocol error of the proxy's, a missed deadline, or an end of its own. */
  ended(reason: string): void;
}

/** Requests are sent in the order they were made, the next after the answer to the one before. */
export class ZdsConnection {
  readonly pid: number;
  /** UIDs that the proxy has acknowledged by an Ack without error. */
  readonly acknowledged = new Set<string>();
  readonly #connection: SeqpacketConnection;
  #standby = false;
  readonly #events: ZdsConnectionEvents;
  readonly #queue: Request[] = [];
  #current: Request | undefined;
  #state: 'greeting' | 'ready' | 'ended' = 'greeting';
  #deadline: NodeJS.Timeout | undefined;

  constructor(connection: SeqpacketConnection, events: ZdsConnectionEvents) {
    this.pid = connection.peer.pid;
    this.#connection = connection;
    this.#events = events;
    connection.onMessage((message) => this.#message(message));
    connection.onClose((error) => this.#end(error === undefined ? 'the proxy closed the connection' : error.message));
    this.#setDeadline('no greeting (ZdsHello)');
  }

  /** By its greeting the proxy can serve no pod yet, and greets again on another connection when it can. */
  get standby(): boolean {
    return this.#standby;
  }

  /** Tells of a pod. @throws ProxyRefusal, ConnectionLost */
  add(workload: ZdsWorkload): Promise<void> {
    return this.#request(
      () => {
        const fd = workload.netnsFd();
        if (fd === undefined) return undefined;
        const { uid, name, namespace, serviceAccount } = workload;
        const data = WorkloadRequest.encode({
          add: { uid, workloadInfo: { name, namespace, serviceAccount } },
        }).finish();
        return { data, fd };
      },
      () => this.acknowledged.add(workload.uid),
    );
  }

  /** Tells that a pod whose network namespace is not known here is to go on; only before `snapshotSent`. */
  keep(uid: string): Promise<void> {
    return this.#request(() => ({ data: WorkloadRequest.encode({ keep: { uid } }).finish() }));
  }

  del(uid: string): Promise<void> {
    this.acknowledged.delete(uid);
    return this.#request(
      () => ({ data: WorkloadRequest.encode({ del: { uid } }).finish() }),
      () => this.acknowledged.delete(uid),
    );
  }

  /** Tells that all pods have been told of. */
  snapshotSent(): Promise<void> {
    return this.#request(() => ({ data: WorkloadRequest.encode({ snapshotSent: {} }).finish() }));
  }

  /** Whether the proxy's process lives, so that its process id is its own. */
  processAlive(): boolean {
    return this.#connection.peerAlive();
  }

  close(reason: string): void {
    this.#end(reason);
  }

  #request(encode: Request['encode'], done: () => void = () => {}): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#state === 'ended') {
        reject(new ConnectionLost('the connection to the proxy has ended'));
        return;
      }
      this.#queue.push({ encode, done, resolve, reject });
      this.#next();
    });
  }

  #next(): void {
    while (this.#state === 'ready' && this.#current === undefined) {
      const request = this.#queue.shift();
      if (request === undefined) return;
      const message = request.encode();
      if (message === undefined) {
        request.reject(new ConnectionLost('the pod was let go before the proxy was told of it'));
        continue;
      }
      this.#current = request;
      this.#setDeadline('no answer (Ack)');
      this.#connection.send(message.data, message.fd).catch((error: Error) => this.#end(error.message));
    }
  }

  #message({ data, fds, truncated }: SeqpacketMessage): void {
    for (const fd of fds) closeSync(fd);
    if (this.#state === 'ended') return;
    let wrong: string | undefined;
    if (truncated) wrong = 'a message longer than 1024 bytes or with too many descriptors';
    else if (fds.length > 0) wrong = 'a message with descriptors';
    else if (this.#state === 'greeting') wrong = this.#greeting(data);
    else wrong = this.#answer(data);
    if (wrong !== undefined) this.#end(`protocol error: the proxy sent ${wrong}`);
    else this.#next();
  }

  /** @returns what is wrong with it */
  #greeting(data: Uint8Array): string | undefined {
    let version: number;
    try {
      const hello = ZdsHello.decode(data);
      ({ version } = hello);
      this.#standby = hello.standby;
    } catch {
      return 'a greeting that is no ZdsHello';
    }
    if (version !== Version.V1) return `a greeting of version ${version}, not V1`;
    clearTimeout(this.#deadline);
    this.#state = 'ready';
    this.#events.ready();
    return undefined;
  }

  /** @returns what is wrong with it */
  #answer(data: Uint8Array): string | undefined {
    const request = this.#current;
    if (request === undefined) return 'a message that nothing was asked for';
    let ack: istio.workload.zds.Ack.$Properties | null | undefined;
    try {
      ({ ack } = WorkloadResponse.decode(data));
    } catch {
      return 'an answer that is no WorkloadResponse';
    }
    if (ack === null || ack === undefined) return 'an answer without an Ack';
    clearTimeout(this.#deadline);
    this.#current = undefined;
    if (ack.error) request.reject(new ProxyRefusal(ack.error));
    else {
      request.done();
      request.resolve();
    }
    return undefined;
  }

  #setDeadline(what: string): void {
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(() => this.#end(`${what} within ${ANSWER_DEADLINE_MS} ms`), ANSWER_DEADLINE_MS);
  }

  #end(reason: string): void {
    if (this.#state === 'ended') return;
    this.#state = 'ended';
    clearTimeout(this.#deadline);
    this.acknowledged.clear();
    this.#connection.close();
    const waiting = this.#current === undefined ? this.#queue.splice(0) : [this.#current, ...this.#queue.splice(0)];
    this.#current = undefined;
    for (const { reject } of waiting) reject(new ConnectionLost(reason));
    this.#events.ended(reason);
  }
}
