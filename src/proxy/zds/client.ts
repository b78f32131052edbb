/** The ZDS client: connected to the node agent's socket again and again; pods go on while it is away. */
import { Backoff } from '../../mesh/backoff.js';
import type { Logger } from '../../mesh/log.js';
import type { SeqpacketConnection } from '../../mesh/seqpacket.js';
import type { Pods } from '../pods.js';
import { ZdsSession } from './session.js';

/** Asking for a local socket costs nothing, and captured pods have no network until the agent is found. */
const MAX_RETRY_MS = 1000;

export interface ZdsClientOptions {
  readonly path: string;
  readonly connect: (path: string) => Promise<SeqpacketConnection> | SeqpacketConnection;
  readonly pods: Pick<Pods, 'add' | 'remove' | 'uids'>;
  readonly log: Logger;
  /** Whether pods can be served: until then they are left to another proxy, where there is one. Default: yes. */
  readonly canServe?: () => boolean;
}

export class ZdsClient {
  readonly #options: ZdsClientOptions;
  readonly #backoff = new Backoff({ initialMs: 20, maxMs: MAX_RETRY_MS });
  #session: ZdsSession | undefined;
  #timer: NodeJS.Timeout | undefined;
  #snapshot = false;
  #stopped = false;
  #said = '';

  constructor(options: ZdsClientOptions) {
    this.#options = options;
  }

  /** Whether the agent is connected and has told of all its pods. */
  get synced(): boolean {
    return this.#snapshot;
  }

  start(): void {
    void this.#connect();
  }

  /** Pods can be served now. */
  ready(): void {
    if (this.#session?.standsBy !== true) return;
    this.#options.log.info({ event: 'zds_ready' }, 'asks the node agent for the pods');
    this.#backoff.reset();
    this.#session.close();
  }

  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#session?.close();
  }

  async #connect(): Promise<void> {
    const { path, log, pods } = this.#options;
    let connection: SeqpacketConnection;
    try {
      connection = await this.#options.connect(path);
    } catch (error) {
      this.#again(error as Error);
      return;
    }
    if (this.#stopped) {
      connection.close();
      return;
    }
    log.info({ event: 'zds_connected', path, peer: connection.peer }, 'connected to the node agent');
    this.#said = '';
    this.#session = new ZdsSession({
      connection,
      pods,
      log,
      standby: this.#options.canServe?.() === false,
      onSnapshot: () => {
        this.#snapshot = true;
        this.#backoff.reset();
      },
      onClose: (error) => {
        this.#session = undefined;
        this.#snapshot = false;
        this.#again(error ?? new Error('the agent closed the connection'));
      },
    });
  }

  #again(error: Error): void {
    if (this.#stopped) return;
    const delayMs = this.#backoff.next();
    const { path, log } = this.#options;
    // Attempts come often at first; the same reason is told once.
    if (this.#said !== error.message) {
      this.#said = error.message;
      const hint = 'check that the node agent runs and that INPOD_UDS is the same for both';
      const fields = { event: 'zds_disconnected', path, error: error.message, retryInMs: Math.round(delayMs), hint };
      log.warn(fields, 'no connection to the node agent; pods go on as they are');
    }
    this.#timer = setTimeout(() => void this.#connect(), delayMs);
  }
}
