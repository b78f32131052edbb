/** An agent that has its node: programs attached, pods on their way into the mesh, proxies told of them. */
import { dirname } from 'node:path';
import type { Logger } from '../mesh/log.js';
import type { Capture, CaptureStatus, HeldPod, HeldTotals } from './capture.js';
import type { Kubelet, KubeletSearch } from './kubelet.js';
import { releaseBpffs } from './mounts.js';
import { type PinsCounters, PinsWatch } from './pins-watch.js';
import { type NetnsFinder, processNetns } from './pod-netns.js';
import { Pods } from './pods.js';
import { Prober } from './prober.js';
import type { PodProgress } from './progress.js';
import { misplaced } from './proxy-place.js';
import type { AgentSettings } from './settings.js';
import type { NodeObjects, SourceProblem } from './source.js';
import { serveStatus } from './status.js';
import { ZdsServer } from './zds-server.js';

export interface ActiveOptions {
  readonly settings: AgentSettings;
  readonly log: Logger;
  /** Closed by this agent. */
  readonly capture: Capture;
  readonly netns: NetnsFinder;
  /** Where the kubelet is looked for, whose probes are to reach pods; undefined: nobody probes. */
  readonly kubelet: { readonly search: KubeletSearch; readonly found: Kubelet | undefined } | undefined;
  problems(): readonly SourceProblem[];
  /** Whether a pod is of the agent's own DaemonSet, or of its namespace where any proxy may be. */
  isProxyPod(name: string): boolean;
  /** Another agent asks for the node. Missing where this one does not give it. */
  handOver?(): void;
  /** Something changed that outlooks tell of. */
  changed(): void;
}

/** Proxies that do not answer in time are not waited for at the end. */
const GOODBYE_MS = 2000;

export class ActiveAgent {
  readonly #options: ActiveOptions;
  readonly #zds: ZdsServer;
  readonly #pods: Pods;
  readonly #prober: Prober | undefined;
  readonly #pins: PinsWatch;
  /** The pods of the node were told at least once, all of them. */
  #applied = false;
  #status: Awaited<ReturnType<typeof serveStatus>> | undefined;

  constructor(options: ActiveOptions) {
    this.#options = options;
    const { settings, capture, netns, log } = options;
    const places = {
      allowed: settings.proxyNetns,
      own: processNetns('self'),
      podOf: (cookie: bigint) => this.#pods.ofNetns(cookie),
      isProxyPod: (name: string) => options.isProxyPod(name),
    };
    this.#zds = new ZdsServer(settings.zdsSocket, log, {
      workloads: () => this.#pods.workloads(),
      misplaced: (pid) => misplaced(processNetns(pid), places),
      trustProxy: (pid) => capture.trustProxy(pid),
      distrustProxy: (pid) => capture.distrustProxy(pid),
      viewChanged: () => options.changed(),
    });
    this.#pods = new Pods({
      nodeName: settings.nodeName,
      excludedNamespaces: settings.excludedNamespaces,
      capture,
      proxies: this.#zds,
      netns,
      log,
      changed: () => options.changed(),
    });
    this.#pins = new PinsWatch({
      capture,
      pinDirectory: settings.pinDirectory,
      runDirectory: dirname(settings.zdsSocket),
      log,
      captureAgain: (uid) => this.#pods.captureAgain(uid),
      settled: () => this.#applied && this.outlooks().every(({ wanted, state }) => !wanted || state === 'captured'),
    });
    const { kubelet } = options;
    if (kubelet !== undefined) this.#prober = new Prober(capture, kubelet.search, log, kubelet.found);
  }

  /**
   * Listens for proxies and for questions. Where that fails nothing stays open; pods that were captured before stay so.
   * @throws Error
   */
  async start(): Promise<void> {
    const { settings, problems, handOver, capture } = this.#options;
    try {
      // The socket first: it tells whether another agent is here, before anything is captured.
      this.#zds.listen();
      this.#status = await serveStatus(settings.statusSocket, {
        status: () => ({
          node: settings.nodeName,
          proxies: this.#zds.proxies(),
          pods: this.#pods.report(),
          problems: problems(),
        }),
        ...(handOver === undefined ? {} : { handOver }),
      });
      this.#pins.start();
    } catch (error) {
      this.#stop(true);
      // The start leaves no trace, and takes nothing away: who was there before holds new pods also while none is captured.
      capture.close({ remove: capture.origin() === 'nothing' });
      throw error;
    }
  }

  apply(objects: NodeObjects, complete: boolean): void {
    this.#pods.apply(objects, complete);
    this.#applied ||= complete;
    this.#options.changed();
  }

  outlooks(): ReturnType<Pods['outlooks']> {
    return this.#pods.outlooks();
  }

  captures(): CaptureStatus[] {
    return this.#options.capture.status();
  }

  /** How new pods are and were held; read from the kernel. */
  holding(): { readonly pods: readonly HeldPod[]; readonly totals: HeldTotals } {
    return { pods: this.#options.capture.held(), totals: this.#options.capture.heldTotals() };
  }

  get proxies(): number {
    return this.#zds.proxies().length;
  }

  get pins(): Readonly<PinsCounters> {
    return this.#pins.counters;
  }

  get failedTries(): number {
    return this.#pods.counters.failedTries;
  }

  /** Gives up the node at once and leaves all pods captured: when this returns, another agent may have it. */
  handOver(): void {
    this.#stop(true);
    this.#options.capture.close({ remove: false });
  }

  /** Ends; with `keep` as {@link handOver}, else nothing is left in the kernel. */
  async close(keep: boolean): Promise<void> {
    const { settings, log, capture } = this.#options;
    if (!keep) {
      await Promise.race([
        this.#pods.releaseAll().catch((error: unknown) => {
          log.error({ event: 'release_failed', err: error }, 'not all pods were let go one by one');
        }),
        new Promise((resolve) => {
          setTimeout(resolve, GOODBYE_MS).unref();
        }),
      ]);
    }
    this.#stop(keep);
    this.#status?.closeAllConnections();
    capture.close({ remove: !keep });
    if (!keep) releaseBpffs(settings.bpffs);
  }

  #stop(kept: boolean): void {
    this.#pins.stop(kept);
    // The status socket before anything else goes: its file must be gone when another agent makes its own.
    this.#status?.close();
    this.#prober?.stop();
    this.#pods.stop();
    this.#zds.close();
  }
}

/** Why an agent is not ready: pods that are neither captured and served nor known for long to have a trouble of their own. */
export function podsPending(pods: readonly PodProgress[], patienceMs: number): string[] {
  return pods
    .filter(({ wanted, good, badForMs }) => wanted && !good && badForMs < patienceMs)
    .map(
      ({ namespace, name, state, reason }) =>
        `pod ${namespace}/${name} (${state}${reason === '' ? '' : `: ${reason}`})`,
    );
}
