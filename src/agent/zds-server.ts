/** The ZDS server: several proxies may be connected, the newest of which gets the pods. Protocol: Istio's zds.proto. */
import { readFileSync } from 'node:fs';
import type { Logger } from '../mesh/log.js';
import { listenSeqpacket } from '../mesh/native-seqpacket.js';
import type { SeqpacketConnection, SeqpacketServer } from '../mesh/seqpacket.js';
import { startTicksOf } from './pod-processes.js';
import { ConnectionLost, ProxyRefusal, ZdsConnection, type ZdsWorkload } from './zds-connection.js';

/** No proxy is connected that could take a pod. */
export class NoProxy extends Error {
  override readonly name = 'NoProxy';
}

/** Where the server asks what to tell, and whom to trust. */
export interface ZdsPods {
  /** All pods that the proxy is to serve now. A workload without a descriptor is one whose namespace is not known yet. */
  workloads(): readonly ZdsWorkload[];
  /** Why a process may not be a proxy, by the network namespace it runs in. Throws when that cannot be found out. */
  misplaced(pid: number): string | undefined;
  /** Called before the first pod is told to a process. Throws when it cannot be trusted. */
  trustProxy(pid: number): void;
  /** Called when a trusted process has ended. */
  distrustProxy(pid: number): void;
  /** Called when what the newest proxy makes of a pod may be another thing than before. */
  viewChanged?(): void;
}

/** What a proxy made of a pod. */
export type ProxyView = { readonly serves: true } | { readonly serves: false; readonly reason: string };

const ACCEPTS_PER_SECOND = 5;
const MAX_CONNECTIONS = 16;
/** Trusted processes are looked at again this often, and before a pod is told of. */
const RECHECK_MS = 1000;

/** When a process was started, in ticks after boot; 0 where it has ended. */
function startOf(pid: number): bigint {
  try {
    return startTicksOf(readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return 0n;
  }
}

export class ZdsServer {
  readonly #path: string;
  readonly #log: Logger;
  readonly #pods: ZdsPods;
  readonly #open = new Set<ZdsConnection>();
  /** Greeted; by the start of their processes, oldest first: after a new agent has come they connect again in any order. */
  readonly #ready: ZdsConnection[] = [];
  /** Greeted, and left alone while another proxy serves the pods. */
  readonly #standby = new Set<ZdsConnection>();
  readonly #trusted = new Set<number>();
  /** Last error of each pod that the newest proxy does not serve. */
  readonly #errors = new Map<string, string>();
  #server: SeqpacketServer | undefined;
  #recheck: NodeJS.Timeout | undefined;
  #closing = false;

  constructor(path: string, log: Logger, pods: ZdsPods) {
    this.#path = path;
    this.#log = log;
    this.#pods = pods;
  }

  /** @throws Error when the socket cannot be made, such as where another agent listens */
  listen(): void {
    this.#server = listenSeqpacket(this.#path, (connection) => this.#accept(connection), {
      acceptsPerSecond: ACCEPTS_PER_SECOND,
      onError: (error) => {
        this.#log.warn({ event: 'zds_accept_failed', path: this.#path, err: error }, 'a connection was not accepted');
      },
    });
    this.#recheck = setInterval(() => this.#checkPlaces(), RECHECK_MS);
    this.#log.info({ event: 'zds_listening', path: this.#path }, 'waiting for proxies');
  }

  close(): void {
    this.#closing = true;
    clearInterval(this.#recheck);
    this.#server?.close();
    for (const connection of [...this.#open]) connection.close('the agent stops');
  }

  /** Processes of the proxies that have greeted, oldest first. */
  proxies(): number[] {
    return this.#ready.map(({ pid }) => pid);
  }

  /** What the newest proxy made of a pod. */
  view(uid: string): ProxyView {
    const newest = this.#ready.at(-1);
    if (newest === undefined) return { serves: false, reason: 'waiting for proxy' };
    if (newest.acknowledged.has(uid)) return { serves: true };
    return { serves: false, reason: this.#errors.get(uid) ?? 'the proxy has not answered yet' };
  }

  /**
   * Tells the newest proxy of a pod; if that goes away meanwhile, the one before.
   * @throws NoProxy when none is there, ProxyRefusal when the proxy cannot serve the pod now
   */
  async add(workload: ZdsWorkload): Promise<void> {
    this.#checkPlaces();
    for (;;) {
      const newest = this.#ready.at(-1);
      if (newest === undefined) throw new NoProxy('waiting for proxy');
      try {
        await this.#addTo(newest, workload);
        return;
      } catch (error) {
        if (!(error instanceof ConnectionLost) || workload.netnsFd() === undefined) throw error;
      }
    }
  }

  /** Tells all proxies that a pod is gone. Resolves when each has answered or is gone itself. */
  async del(uid: string): Promise<void> {
    this.#errors.delete(uid);
    await Promise.all(
      this.#ready.map((connection) =>
        connection.del(uid).catch((error: Error) => {
          if (error instanceof ConnectionLost) return;
          this.#log.warn({ event: 'zds_del_refused', uid, proxy: connection.pid, error: error.message }, error.message);
        }),
      ),
    );
  }

  async #addTo(connection: ZdsConnection, workload: ZdsWorkload): Promise<void> {
    const { uid, namespace, name } = workload;
    try {
      await connection.add(workload);
      this.#errors.delete(uid);
      this.#pods.viewChanged?.();
    } catch (error) {
      if (error instanceof ProxyRefusal) {
        this.#errors.set(uid, `the proxy cannot serve it: ${error.message}`);
        this.#pods.viewChanged?.();
        this.#log.warn(
          { event: 'zds_add_refused', uid, namespace, pod: name, proxy: connection.pid, error: error.message },
          'the proxy cannot serve a pod; the pod stays captured and has no network for TCP until it can',
        );
      }
      throw error;
    }
  }

  #accept(socket: SeqpacketConnection): void {
    const { pid, uid } = socket.peer;
    const refuse = (reason: string): void => {
      this.#log.warn({ event: 'zds_refused', proxy: pid, uid, reason }, reason);
      socket.close();
    };
    if (pid === 0) {
      refuse('the process is not in the agent’s pid namespace, so it cannot be recognised; give the agent hostPID');
      return;
    }
    if (uid !== 0 && uid !== process.getuid?.()) {
      refuse('only root, or the user that runs the agent, can be a proxy');
      return;
    }
    const misplaced = this.#misplaced(pid);
    if (misplaced !== undefined) {
      refuse(misplaced);
      return;
    }
    if (this.#open.size >= MAX_CONNECTIONS) {
      refuse(`${MAX_CONNECTIONS} proxies are connected already`);
      return;
    }
    const connection: ZdsConnection = new ZdsConnection(socket, {
      ready: () => this.#greeted(connection),
      ended: (reason) => this.#ended(connection, reason),
    });
    this.#open.add(connection);
    socket.onPeerExit(() => this.#exited(pid));
  }

  #greeted(connection: ZdsConnection): void {
    const { pid } = connection;
    try {
      // Again, since it may have moved since it connected; and after it is trusted, since it may have meanwhile.
      const before = this.#misplaced(pid);
      if (before !== undefined) throw new Error(before);
      this.#pods.trustProxy(pid);
      const after = this.#misplaced(pid) ?? (connection.processAlive() ? undefined : 'its process has ended');
      if (after !== undefined) {
        this.#pods.distrustProxy(pid);
        throw new Error(after);
      }
    } catch (error) {
      this.#log.error({ event: 'zds_not_trusted', proxy: pid, err: error }, 'a proxy cannot be trusted');
      connection.close(`it cannot be trusted: ${(error as Error).message}`);
      return;
    }
    this.#trusted.add(pid);
    if (connection.standby && this.#ready.length > 0) {
      this.#standby.add(connection);
      this.#log.info({ event: 'zds_standby', proxy: pid }, 'a proxy is connected that cannot serve pods yet');
      return;
    }
    this.#serve(connection);
  }

  /** Tells a proxy of all pods; from here on it is one of those that serve them. */
  #serve(connection: ZdsConnection): void {
    const { pid } = connection;
    this.#ready.push(connection);
    const started = new Map(this.#ready.map((each) => [each, startOf(each.pid)]));
    this.#ready.sort((a, b) => Number((started.get(a) ?? 0n) - (started.get(b) ?? 0n)));
    this.#errors.clear();
    const workloads = this.#pods.workloads();
    this.#log.info({ event: 'zds_connected', proxy: pid, pods: workloads.length }, 'a proxy is connected');
    // All in one turn: what changes later is asked for later, after the snapshot.
    for (const workload of workloads) {
      const { uid } = workload;
      const told = workload.netnsFd() === undefined ? connection.keep(uid) : this.#addTo(connection, workload);
      told.catch(() => {});
    }
    connection.snapshotSent().then(
      () => this.#log.info({ event: 'zds_snapshot_done', proxy: pid }, 'the proxy knows all pods'),
      (error: Error) => {
        if (error instanceof ProxyRefusal) connection.close(`the snapshot was refused: ${error.message}`);
      },
    );
  }

  #ended(connection: ZdsConnection, reason: string): void {
    this.#open.delete(connection);
    this.#standby.delete(connection);
    const wasNewest = this.#ready.at(-1) === connection;
    const index = this.#ready.indexOf(connection);
    if (index >= 0) this.#ready.splice(index, 1);
    this.#log.warn({ event: 'zds_disconnected', proxy: connection.pid, reason }, 'a proxy is disconnected');
    if (this.#closing) return;
    this.#pods.viewChanged?.();
    if (this.#ready.length === 0) {
      // Better one that is not ready than none: what it cannot decide yet waits there.
      for (const waiting of [...this.#standby]) {
        this.#standby.delete(waiting);
        this.#serve(waiting);
      }
      return;
    }
    const newest = this.#ready.at(-1);
    if (wasNewest && newest !== undefined) {
      // What was told to the newest only must be told to the one that is the newest now.
      for (const workload of this.#pods.workloads()) {
        if (newest.acknowledged.has(workload.uid) || workload.netnsFd() === undefined) continue;
        this.#addTo(newest, workload).catch(() => {});
      }
    }
  }

  /** Why a process may not be a proxy; that its namespace is not known is a reason too. */
  #misplaced(pid: number): string | undefined {
    try {
      return this.#pods.misplaced(pid);
    } catch (error) {
      return `its network namespace cannot be found out: ${(error as Error).message}`;
    }
  }

  /** Takes back the trust in processes that have moved, or whose namespace has become a pod's. */
  #checkPlaces(): void {
    for (const pid of [...this.#trusted]) {
      let reason: string | undefined;
      try {
        reason = this.#pods.misplaced(pid);
      } catch {
        // It ends, which will be seen; or the agent lacks something, which is no reason to stop all traffic.
      }
      if (reason === undefined) continue;
      this.#log.error({ event: 'zds_distrusted', proxy: pid, reason }, 'a process is not trusted as a proxy any more');
      this.#distrust(pid);
      for (const connection of [...this.#open]) {
        if (connection.pid === pid) connection.close(`it is not trusted any more: ${reason}`);
      }
    }
  }

  #distrust(pid: number): void {
    this.#trusted.delete(pid);
    try {
      this.#pods.distrustProxy(pid);
    } catch (error) {
      this.#log.error({ event: 'distrust_failed', proxy: pid, err: error }, 'a process could not be distrusted');
    }
  }

  /** A process may end long after its socket; as long as it lives, its listeners and dials are the proxy's. */
  #exited(pid: number): void {
    // At the end of the agent all trust goes with its maps.
    if (!this.#trusted.has(pid) || this.#closing) return;
    this.#log.info({ event: 'proxy_exited', proxy: pid }, 'the process of a proxy has ended');
    this.#distrust(pid);
  }
}
