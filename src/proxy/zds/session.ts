/** One ZDS connection: takes the agent's messages one by one, and answers each with exactly one Ack. */
import { closeSync } from 'node:fs';
import type { Logger } from '../../mesh/log.js';
import { istio } from '../../mesh/proto/generated.js';
import type { SeqpacketConnection, SeqpacketMessage } from '../../mesh/seqpacket.js';
import type { PodInfo, Pods } from '../pods.js';

const { WorkloadRequest, WorkloadResponse, ZdsHello, Version } = istio.workload.zds;

/** Longest message of ZDS, in bytes. */
const MAX_MESSAGE_BYTES = 1024;

/** The agent does not keep to the protocol: said in the Ack, then the connection ends. */
class ProtocolError extends Error {}

export interface SessionOptions {
  readonly connection: SeqpacketConnection;
  readonly pods: Pick<Pods, 'add' | 'remove' | 'uids'>;
  readonly log: Logger;
  /** Greet as one that cannot serve pods yet. */
  readonly standby?: boolean;
  /** The agent told of every pod. */
  onSnapshot(): void;
  onClose(error?: Error): void;
}

export class ZdsSession {
  readonly #options: SessionOptions;
  /** Pods named on this connection, until the snapshot is whole. */
  #named: Set<string> | undefined = new Set();
  #closed = false;
  #idle = true;

  constructor(options: SessionOptions) {
    this.#options = options;
    const { connection } = options;
    connection.onMessage((message) => this.#receive(message));
    connection.onClose((error) => this.#close(error));
    const { standby = false } = options;
    this.#send(ZdsHello.encode({ version: Version.V1, ...(standby ? { standby } : {}) }).finish());
  }

  /** The agent leaves this proxy alone, as it was greeted for. */
  get standsBy(): boolean {
    return this.#options.standby === true && this.#idle;
  }

  close(): void {
    this.#close();
  }

  #receive(message: SeqpacketMessage): void {
    this.#idle = false;
    const fds = new Set(message.fds);
    let error: string | undefined;
    let fatal = false;
    if (!this.#closed) {
      try {
        this.#handle(message, (fd) => fds.delete(fd));
      } catch (problem) {
        error = (problem as Error).message;
        fatal = problem instanceof ProtocolError;
      }
    }
    // What nobody took must not stay open.
    for (const fd of fds) closeSync(fd);
    if (this.#closed) return;
    this.#send(WorkloadResponse.encode({ ack: { error: truncate(error ?? '') } }).finish(), fatal ? error : undefined);
  }

  /** @param take says that the callee owns the descriptor now */
  #handle(message: SeqpacketMessage, take: (fd: number) => void): void {
    if (message.truncated || message.data.length > MAX_MESSAGE_BYTES) {
      throw new ProtocolError(`a message is longer than ${MAX_MESSAGE_BYTES} bytes or carries too many descriptors`);
    }
    if (message.fds.length > 1) throw new ProtocolError(`a message carries ${message.fds.length} descriptors, not one`);
    const [fd] = message.fds;
    const request = decode(message.data);
    if (request.add) {
      if (fd === undefined) throw new ProtocolError('Add without the descriptor of a network namespace');
      this.#add(request.add, fd, take);
      return;
    }
    if (fd !== undefined) throw new ProtocolError('a descriptor with a message other than Add');
    if (request.keep) {
      if (this.#named === undefined) throw new ProtocolError('Keep after the snapshot');
      this.#named.add(checkUid(request.keep.uid));
    } else if (request.del) {
      const uid = checkUid(request.del.uid);
      if (this.#named === undefined) this.#options.pods.remove(uid);
      else this.#named.delete(uid);
    } else if (request.snapshotSent) {
      this.#snapshot();
    } else throw new ProtocolError('a message of an unknown kind');
  }

  #add(add: istio.workload.zds.AddWorkload.$Properties, netnsFd: number, take: (fd: number) => void): void {
    const uid = checkUid(add.uid);
    const info = add.workloadInfo;
    if (!info) throw new ProtocolError('Add without workload_info');
    const { name, namespace, serviceAccount } = info;
    if (!name || !namespace) throw new ProtocolError('Add whose workload_info has no name or no namespace');
    // Named also where it fails now: it is tried again.
    this.#named?.add(uid);
    const pod: PodInfo = { uid, name, namespace, serviceAccount: serviceAccount || 'default' };
    take(netnsFd);
    this.#options.pods.add(pod, netnsFd);
  }

  #snapshot(): void {
    const named = this.#named;
    if (named === undefined) throw new ProtocolError('a second SnapshotSent');
    this.#named = undefined;
    const { pods, log, onSnapshot } = this.#options;
    const gone = pods.uids().filter((uid) => !named.has(uid));
    for (const uid of gone) pods.remove(uid);
    log.info({ event: 'zds_snapshot', pods: named.size, stopped: gone.length }, 'the agent told of all its pods');
    onSnapshot();
  }

  /** @param last the connection ends once this is sent, for this reason */
  #send(data: Uint8Array, last?: string): void {
    this.#options.connection.send(data).then(
      () => {
        if (last !== undefined) this.#close(new Error(last));
      },
      (error: unknown) => this.#close(error as Error),
    );
  }

  #close(error?: Error): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#options.connection.close();
    this.#options.onClose(error);
  }
}

function decode(data: Uint8Array): istio.workload.zds.WorkloadRequest {
  try {
    return WorkloadRequest.decode(data);
  } catch (error) {
    throw new ProtocolError(`a message cannot be decoded: ${(error as Error).message}`);
  }
}

function checkUid(uid: string | null | undefined): string {
  if (!uid) throw new ProtocolError('a message without uid');
  return uid;
}

/** So that the Ack fits one message. */
function truncate(error: string): string {
  return Buffer.from(error).subarray(0, 900).toString();
}
