/** The node agent: pods of the API or of manifests in; pods captured by the kernel and told to the proxy out. */
import { dirname } from 'node:path';
import { type Api, openApi } from '../mesh/api/index.js';
import { watchClock } from '../mesh/clock.js';
import { ClockSkew } from '../mesh/clock-skew.js';
import type { HttpListener } from '../mesh/http.js';
import type { Logger } from '../mesh/log.js';
import { ActiveAgent, podsPending } from './active.js';
import { apiSource } from './api-source.js';
import { BootGuardKeeper } from './boot-guard/index.js';
import type { Capture } from './capture.js';
import { CniNamespaces } from './cni-netns.js';
import { OwnDaemonSet } from './daemonset.js';
import { findKubelet, isRunning, type Kubelet, type KubeletSearch } from './kubelet.js';
import { manifestSource } from './manifest-source.js';
import { openCapture } from './native-capture.js';
import { closeFd, openNetns } from './netns.js';
import { PodEvents } from './pod-events.js';
import { kernelNetns, type NetnsFinder } from './pod-netns.js';
import { PodProcesses } from './pod-processes.js';
import { Progress } from './progress.js';
import { Redirections } from './redirections.js';
import { RootFile } from './root-file.js';
import type { AgentSettings } from './settings.js';
import { isSibling } from './siblings.js';
import type { NodeObjects, PodSource } from './source.js';
import { Takeover } from './takeover.js';

/** States are looked at again this often without a change: what is late is told. */
const TICK_MS = 1000;
/** The kubelet is looked for no more often than this while there is no capture, in milliseconds. */
const SEEK_MS = 2000;

function canOpen(path: string): boolean {
  try {
    closeFd(openNetns(path));
    return true;
  } catch {
    return false;
  }
}

/** A running agent. */
export class Agent {
  readonly #settings: AgentSettings;
  readonly #log: Logger;
  readonly #api: Api | undefined;
  readonly #source: PodSource;
  readonly #netns: NetnsFinder;
  readonly #progress: Progress;
  readonly #redirections: Redirections | undefined;
  readonly #events: PodEvents | undefined;
  readonly #daemonSet: OwnDaemonSet | undefined;
  readonly #rootFile: RootFile | undefined;
  readonly #bootGuard: BootGuardKeeper;
  readonly #takeover: Takeover;
  readonly #skew: ClockSkew;
  #clock: { close(): void } | undefined;
  readonly #kubeletSearch: KubeletSearch | undefined;
  #kubelet: Kubelet | undefined;
  #soughtMs = Number.NEGATIVE_INFINITY;
  /** Path of the node's network namespace, where it is not this process's own. */
  #hostNetns: string | undefined;
  #durations: number[] = [];
  #latest: { readonly objects: NodeObjects; readonly complete: boolean } | undefined;
  #active: ActiveAgent | undefined;
  #http: HttpListener | undefined;
  #tick: NodeJS.Timeout | undefined;
  #lookScheduled = false;
  #wasReady = false;
  #hadNode = false;
  #closing = false;
  #failedTries = 0;

  constructor(settings: AgentSettings, log: Logger) {
    this.#settings = settings;
    this.#log = log;
    const { manifests, kubeconfig, nodeName, ownPod, rootCert, hostProc } = settings;
    this.#skew = new ClockSkew(log);
    this.#progress = new Progress((ms) => this.#durations.push(ms / 1000));
    if (manifests === undefined) {
      this.#kubeletSearch = { proc: hostProc, port: settings.kubeletPort, nodeName };
      this.#api = openApi({
        kubeconfig,
        userAgent: 'ebbtide-agent',
        onTime: (offset) => this.#skew.told('Kubernetes API', offset),
      });
      this.#source = apiSource(this.#api, nodeName, log);
      this.#redirections = new Redirections(this.#api, log);
      this.#events = new PodEvents(this.#api, nodeName, log);
      if (ownPod !== undefined) this.#daemonSet = new OwnDaemonSet(this.#api, ownPod, nodeName);
      if (ownPod !== undefined && rootCert !== undefined) {
        this.#rootFile = new RootFile({ api: this.#api, pod: ownPod, path: rootCert, log });
      }
      this.#netns = kernelNetns({
        processes: new PodProcesses({ proc: hostProc }),
        mounted: new CniNamespaces(settings.cniNetns),
        hostNetnsPath: () => this.#hostNetns ?? `${hostProc}/1/ns/net`,
      });
    } else {
      this.#source = manifestSource(manifests, log);
      this.#netns = kernelNetns();
    }
    this.#bootGuard = new BootGuardKeeper({
      place: settings.bootGuard,
      runDirectory: dirname(settings.zdsSocket),
      log,
    });
    this.#takeover = new Takeover({
      statusSocket: settings.statusSocket,
      log,
      open: () => this.#openCapture(),
      begin: (capture) => this.#begin(capture),
    });
  }

  /**
   * Starts. Resolves once it has the node and listens for proxies; or, where another agent has the node and is asked for it,
   * once that is under way.
   * @throws Error that says what to do
   */
  async start(): Promise<void> {
    const settings = this.#settings;
    const log = this.#log;
    if (settings.bpffsMounted) {
      log.info({ event: 'bpffs_mounted', path: settings.bpffs }, 'mounted a bpffs, because there was none');
    }
    if (settings.port !== undefined) await this.#startHttp(settings.port);
    try {
      // First what leaves no trace where it fails. The API may be away for long; what is captured is adopted without it.
      this.#startSource();
      void this.#findDaemonSet();
      await this.#takeover.start(settings.takeOver);
    } catch (error) {
      await this.#stop(true);
      throw error;
    }
    this.#tick = setInterval(() => this.#look(), TICK_MS);
    this.#clock = watchClock((jump) => this.#skew.jumped(jump));
  }

  /** What the agent still waits for; empty when it is ready. Once it was, pods that come later do not change that. */
  pending(): readonly string[] {
    if (this.#active === undefined) {
      // The DaemonSet is being updated: this generation ends soon, and to say that it failed would be wrong.
      return this.#hadNode ? [] : ['the node, which another agent has'];
    }
    if (this.#wasReady) return [];
    if (!this.#source.synced) return ['the pods and namespaces of the cluster'];
    const pending = podsPending(this.#progress.latest, this.#settings.readyPatienceMs);
    if (pending.length === 0) this.#wasReady = true;
    return pending;
  }

  /** Ends. Whether pods stay captured: by the settings, or by what becomes of the DaemonSet. */
  async close(): Promise<void> {
    this.#closing = true;
    this.#takeover.stop();
    const { keep, reason } = await this.#ending();
    this.#log.info({ event: 'ending', keep, reason }, keep ? 'pods stay captured' : 'all pods are let go');
    if (!keep) await this.#removeAnnotations();
    await this.#stop(keep);
    if (!keep) this.#bootGuard.end();
    this.#log.info({ event: 'stopped', kept: keep }, keep ? 'stopped; pods stay captured' : 'stopped; nothing is left');
  }

  async #ending(): Promise<{ readonly keep: boolean; readonly reason: string }> {
    const { keep } = this.#settings;
    if (keep !== undefined) return { keep, reason: 'by the settings' };
    if (this.#active === undefined) return { keep: true, reason: 'another agent has the node' };
    if (this.#daemonSet === undefined) return { keep: true, reason: 'it is not known to be of a DaemonSet' };
    return this.#daemonSet.ending();
  }

  #startSource(): void {
    this.#source.start({
      onChange: (objects, complete) => {
        this.#latest = { objects, complete };
        this.#active?.apply(objects, complete);
      },
    });
  }

  async #findDaemonSet(): Promise<void> {
    const daemonSet = this.#daemonSet;
    while (daemonSet !== undefined && !this.#closing) {
      try {
        await daemonSet.find();
        this.#log.info(
          { event: 'daemonset_found', daemonSet: daemonSet.name },
          'at its end tells what becomes of pods',
        );
        return;
      } catch (error) {
        const reason = (error as Error).message;
        this.#log.warn(
          { event: 'daemonset_not_found', reason },
          'the DaemonSet of this agent cannot be read, so pods would stay captured at its end; trying again',
        );
        await new Promise((resolve) => {
          setTimeout(resolve, 30_000).unref();
        });
      }
    }
  }

  /** @throws CaptureError */
  #openCapture(): Capture {
    const { cgroup, pinDirectory, hold, classicGuard, hostProc, hostNetns, ownPod } = this.#settings;
    if (this.#kubeletSearch !== undefined) {
      // Tried again and again while another agent has the node, but looked for only every now and then.
      const now = performance.now();
      const stale = this.#kubelet === undefined || !isRunning(this.#kubeletSearch, this.#kubelet);
      if (stale && now - this.#soughtMs > SEEK_MS) {
        this.#soughtMs = now;
        this.#kubelet = findKubelet(this.#kubeletSearch);
      }
      const ofKubelet = this.#kubelet === undefined ? undefined : `${hostProc}/${this.#kubelet.pid}/ns/net`;
      this.#hostNetns = [hostNetns, ofKubelet, `${hostProc}/1/ns/net`].find(
        (path) => path !== undefined && canOpen(path),
      );
    }
    const capture = openCapture({
      cgroup,
      pinDirectory,
      classicGuard,
      ...(this.#hostNetns === undefined ? {} : { hostNetns: this.#hostNetns }),
      ...(hold === undefined ? {} : { hold }),
    });
    // Where no agent was alive to decide about this pod it is held like any new one, and the API, which would tell that it
    // need not be, could never be asked.
    if (hold !== undefined && ownPod?.uid !== undefined) capture.decide(ownPod.uid, 'plain');
    return capture;
  }

  async #begin(capture: Capture): Promise<void> {
    const { cgroup, pinDirectory, nodeName, takeOver } = this.#settings;
    const hostNetns = this.#hostNetns ?? 'its own';
    this.#log.info({ event: 'capture_open', cgroup, pins: pinDirectory, hostNetns }, 'programs are attached');
    const active: ActiveAgent = new ActiveAgent({
      settings: this.#settings,
      log: this.#log,
      capture,
      netns: this.#netns,
      kubelet: this.#kubeletSearch === undefined ? undefined : { search: this.#kubeletSearch, found: this.#kubelet },
      problems: () => this.#source.problems(),
      isProxyPod: (name) => isSibling(name, this.#latest?.objects.pods ?? [], this.#settings),
      ...(takeOver ? { handOver: () => this.#handOver() } : {}),
      changed: () => this.#lookSoon(),
    });
    await active.start();
    if (this.#closing) {
      await active.close(true);
      return;
    }
    this.#active = active;
    this.#hadNode = true;
    if (this.#latest !== undefined) active.apply(this.#latest.objects, this.#latest.complete);
    this.#log.info({ event: 'started', node: nodeName }, 'the agent is running');
    this.#bootGuard.begin(capture.origin());
  }

  #handOver(): void {
    const active = this.#active;
    if (active === undefined) return;
    this.#active = undefined;
    this.#failedTries += active.failedTries;
    active.handOver();
    this.#log.info({ event: 'handed_over' }, 'another agent asked for this node; standing by in case it ends');
    this.#takeover.standBy();
  }

  /** Looks at all pods after this turn of the event loop. */
  #lookSoon(): void {
    if (this.#lookScheduled) return;
    this.#lookScheduled = true;
    setImmediate(() => {
      this.#lookScheduled = false;
      this.#look();
    });
  }

  #look(): void {
    if (this.#closing) return;
    this.#rootFile?.look();
    if (this.#active === undefined) return;
    const pods = this.#progress.update(this.#active.outlooks());
    this.#redirections?.update(pods);
    this.#events?.update(pods);
  }

  /** Tells everybody that the pods of this node speak plainly, as far as that can be told now. */
  async #removeAnnotations(): Promise<void> {
    if (this.#active === undefined || this.#redirections === undefined) return;
    const pods = this.#active.outlooks().map((pod) => ({ ...pod, wanted: false, state: 'leaving' as const }));
    this.#redirections.update(pods.map((pod) => ({ ...pod, good: false, badForMs: 0 })));
    clearInterval(this.#tick);
    const deadline = performance.now() + 3000;
    while (!this.#redirections.settled && performance.now() < deadline) {
      await new Promise((resolve) => {
        setTimeout(resolve, 20);
      });
    }
  }

  async #startHttp(port: number): Promise<void> {
    const { startAgentHttp } = await import('./http.js');
    this.#http = await startAgentHttp({
      port,
      log: this.#log,
      pending: () => this.pending(),
      sources: {
        pods: () => (this.#active === undefined ? [] : this.#progress.latest),
        captures: () => this.#active?.captures() ?? [],
        holding: () => this.#active?.holding(),
        proxies: () => this.#active?.proxies ?? 0,
        active: () => this.#active !== undefined,
        clockSkewMs: () => this.#skew.worstMs,
        bootGuard: () => this.#bootGuard,
        sourceInOrder: () => this.#source.synced && this.#source.problems().length === 0,
        takeDurations: () => this.#durations.splice(0),
        counters: () => ({
          failedTries: this.#failedTries + (this.#active?.failedTries ?? 0),
          pinsRestored: this.#active?.pins.restored ?? 0,
          programsReattached: this.#active?.pins.reattached ?? 0,
          pinsLost: this.#active?.pins.lost ?? 0,
          redirectionsWritten: this.#redirections?.counters.written ?? 0,
          redirectionsFailed: this.#redirections?.counters.failed ?? 0,
          eventsWritten: this.#events?.counters.written ?? 0,
          eventsFailed: this.#events?.counters.failed ?? 0,
        }),
      },
    });
    this.#log.info({ event: 'http_listening', port: this.#http.port }, 'metrics and readiness');
  }

  async #stop(keep: boolean): Promise<void> {
    clearInterval(this.#tick);
    this.#clock?.close();
    this.#takeover.stop();
    this.#source.stop();
    this.#redirections?.stop();
    await this.#active?.close(keep);
    this.#active = undefined;
    this.#http?.close();
    this.#api?.close();
  }
}
