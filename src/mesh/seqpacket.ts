/** SOCK_SEQPACKET unix sockets with descriptors in messages: the transport of ZDS. Face of native/seqpacket. */

/** One message; at most 1024 bytes and one descriptor by ZDS's rules. */
export interface SeqpacketMessage {
  readonly data: Buffer;
  /** Descriptors that came with it; the receiver owns and closes them. */
  readonly fds: readonly number[];
  /** MSG_TRUNC or MSG_CTRUNC: the message is not whole and must be refused. */
  readonly truncated: boolean;
}

/** Process on the other side as SO_PEERCRED tells, in the reader's pid namespace. */
export interface PeerCredentials {
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
}

export interface SeqpacketConnection {
  readonly peer: PeerCredentials;
  /** Sends one message, with a descriptor (which the caller keeps) if given. Rejects when the other side is gone. */
  send(data: Uint8Array, fd?: number): Promise<void>;
  onMessage(listener: (message: SeqpacketMessage) => void): void;
  /** Called once: the other side closed, failed (error given), or `close` was called. */
  onClose(listener: (error?: Error) => void): void;
  /** Called once when the peer *process* has ended (pidfd), which is later than or equal to the socket's end. */
  onPeerExit(listener: () => void): void;
  /**
   * Whether the peer process has not ended, asked now: what was read of it by its process id before was its own. False also
   * after `close` where nobody listens for its end.
   */
  peerAlive(): boolean;
  close(): void;
}

export interface SeqpacketServer {
  /** Stops listening and removes the socket file; open connections stay. */
  close(): void;
}
