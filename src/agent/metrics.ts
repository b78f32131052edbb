/** The agent's metrics in Prometheus' format. No label names a pod: their number has no bound. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { CaptureStatus, HeldPod, HeldTotals } from './capture.js';
import type { PodProgress } from './progress.js';

/** Where the figures come from; asked on scrape. */
export interface MetricSources {
  pods(): readonly PodProgress[];
  /** From the datapath; empty while another agent has the node. */
  captures(): readonly CaptureStatus[];
  /** How new pods are and were held; undefined while another agent has the node. */
  holding(): { readonly pods: readonly HeldPod[]; readonly totals: HeldTotals } | undefined;
  proxies(): number;
  /** Whether this agent has the node. */
  active(): boolean;
  /** Whether all that is read of the cluster was read and is being watched. */
  sourceInOrder(): boolean;
  /** How far this machine's clock is behind that of the API server; 0 where they agree. */
  clockSkewMs(): number;
  /** Of the boot guard; each undefined where there is nothing to tell. */
  bootGuard(): { readonly guarded: boolean | undefined; readonly installed: boolean | undefined };
  counters(): AgentCounters;
  /** Seconds that pods took to be enrolled, since the last call. */
  takeDurations(): readonly number[];
}

/** Counted since the start of the process. */
export interface AgentCounters {
  readonly failedTries: number;
  readonly pinsRestored: number;
  readonly programsReattached: number;
  readonly pinsLost: number;
  readonly redirectionsWritten: number;
  readonly redirectionsFailed: number;
  readonly eventsWritten: number;
  readonly eventsFailed: number;
}

const STATES = ['waiting', 'preparing', 'captured', 'leaving', 'adopted', 'not enrolled'] as const;
/** Seconds: from what is not felt to what an operator has to look at. */
const BUCKETS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300];

export class AgentMetrics {
  readonly #registry = new Registry();

  constructor(sources: MetricSources) {
    const registers = [this.#registry];
    const gauge = this.#gauge.bind(this);
    const counter = this.#counter.bind(this);
    new Gauge({
      name: 'ebbtide_agent_pods',
      help: 'Pods of this node by state of their enrolment',
      labelNames: ['state'],
      registers,
      collect() {
        const pods = sources.pods();
        for (const state of STATES) this.set({ state }, pods.filter((pod) => pod.state === state).length);
      },
    });
    gauge(
      'pods_wanted',
      'Pods of this node that belong in the mesh',
      () => sources.pods().filter(({ wanted }) => wanted).length,
    );
    gauge(
      'pods_not_served',
      'Pods that belong in the mesh and are not captured or not served by the proxy',
      () => sources.pods().filter(({ wanted, good }) => wanted && !good).length,
    );
    gauge(
      'longest_not_served_seconds',
      'How long the pod that has waited longest to be captured and served has waited',
      () => Math.max(0, ...sources.pods().map(({ badForMs }) => badForMs)) / 1000,
    );
    new Histogram({
      name: 'ebbtide_agent_enrolment_duration_seconds',
      help: 'From when a pod was first seen to belong in the mesh to when it was captured and served',
      buckets: BUCKETS,
      registers,
      collect() {
        for (const seconds of sources.takeDurations()) this.observe(seconds);
      },
    });
    gauge('proxies_connected', 'Proxies that are connected by ZDS', () => sources.proxies());
    gauge('active', 'Whether this agent has the node (1), or stands by for another one (0)', () =>
      Number(sources.active()),
    );
    gauge('source_in_order', 'Whether the Kubernetes API (or the manifests) was read and is being watched', () =>
      Number(sources.sourceInOrder()),
    );
    gauge(
      'clock_skew_seconds',
      'How far the clock is behind that of the Kubernetes API (negative: ahead), 0 below 5 s',
      () => sources.clockSkewMs() / 1000,
    );
    counter('enrolment_retries_total', 'Tries to enrol a pod that failed', () => sources.counters().failedTries);
    counter(
      'pins_restored_total',
      'Pins that were gone from the bpffs and were made again',
      () => sources.counters().pinsRestored,
    );
    counter(
      'programs_reattached_total',
      'Programs of the node that somebody else had detached',
      () => sources.counters().programsReattached,
    );
    counter(
      'pins_lost_total',
      'Times that all was gone which an agent before had pinned, so that its pods spoke in clear',
      () => sources.counters().pinsLost,
    );
    counter(
      'redirections_written_total',
      'Annotations ambient.istio.io/redirection written',
      () => sources.counters().redirectionsWritten,
    );
    counter(
      'redirections_failed_total',
      'Annotations that could not be written',
      () => sources.counters().redirectionsFailed,
    );
    counter('events_written_total', 'Kubernetes Events written', () => sources.counters().eventsWritten);
    counter(
      'events_failed_total',
      'Kubernetes Events that could not be written',
      () => sources.counters().eventsFailed,
    );
    this.#bootGuardMetrics(sources);
    this.#captureMetrics(sources);
    this.#holdMetrics(sources);
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  render(): Promise<string> {
    return this.#registry.metrics();
  }

  #gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      name: `ebbtide_agent_${name}`,
      help,
      registers: [this.#registry],
      collect() {
        this.set(read());
      },
    });
  }

  #counter(name: string, help: string, read: () => number): void {
    new Counter({
      name: `ebbtide_agent_${name}`,
      help,
      registers: [this.#registry],
      collect() {
        this.reset();
        this.inc(read());
      },
    });
  }

  /** Without a sample where there is nothing to tell, so that an alert on 0 is about a guard that should be there. */
  #bootGuardMetrics(sources: MetricSources): void {
    const figures = {
      boot_guarded: ['Whether the boot guard held new pods at this boot', () => sources.bootGuard().guarded],
      boot_guard_installed: ['Whether the boot guard is installed', () => sources.bootGuard().installed],
    } as const satisfies Record<string, readonly [string, () => boolean | undefined]>;
    for (const [name, [help, read]] of Object.entries(figures)) {
      new Gauge({
        name: `ebbtide_agent_${name}`,
        help: `${help} (1) or not (0); none where no guard is used`,
        registers: [this.#registry],
        collect() {
          const value = read();
          this.reset();
          if (value === undefined) this.remove();
          else this.set(Number(value));
        },
      });
    }
  }

  #holdMetrics(sources: MetricSources): void {
    const registers = [this.#registry];
    const observed = new Set<string>();
    let holding: ReturnType<MetricSources['holding']>;
    const held = (): readonly HeldPod[] => holding?.pods.filter((pod) => pod.held) ?? [];
    const duration = new Histogram({
      name: 'ebbtide_agent_held_duration_seconds',
      help: 'How long pods that came were held, from their cgroup to their capture or the decision to leave them alone',
      buckets: BUCKETS,
      registers,
      collect() {
        // One look into the kernel a scrape.
        holding = sources.holding();
        const there = new Set(holding?.pods.map(({ uid }) => uid));
        for (const uid of observed) if (!there.has(uid)) observed.delete(uid);
        for (const pod of holding?.pods ?? []) {
          if (pod.held || observed.has(pod.uid)) continue;
          observed.add(pod.uid);
          duration.observe(pod.heldMs / 1000);
        }
      },
    });
    const gauge = this.#gauge.bind(this);
    gauge('held_pods', 'New pods that are held now', () => held().length);
    gauge(
      'held_longest_seconds',
      'How long the pod that is held longest is held',
      () => Math.max(0, ...held().map(({ heldMs }) => heldMs)) / 1000,
    );
    const totals = {
      new_pods: ['pods', 'Pods that appeared since holding began'],
      new_pods_unseen: ['unseen', 'Pods that could not be held, because there was no room for them'],
      held_connects_refused: ['refusedConnects', 'Connects of pods that failed because nothing was decided about them'],
      held_connects_delayed: ['delayedConnects', 'Connects of pods that had to wait for their capture'],
      held_inbound_dropped: ['refusedInbound', 'Packets to listening sockets of held pods that were dropped'],
    } as const satisfies Record<string, readonly [keyof HeldTotals, string]>;
    for (const [name, [key, help]] of Object.entries(totals)) {
      this.#counter(`${name}_total`, help, () => holding?.totals[key] ?? 0);
    }
  }

  /** Sums over the pods that are captured now: they fall when a pod goes, so they are gauges, but rates of them are of use. */
  #captureMetrics(sources: MetricSources): void {
    const figures = {
      captured_connections: ['Connections that captured pods opened into the mesh', (each) => each.capturedConnections],
      steered_connections: [
        'Connections to captured pods that were handed to the proxy',
        (each) => each.steeredConnections,
      ],
      refused_connections: ['Connects of captured pods that were refused', (each) => each.refusedConnections],
      guard_drops: ['Packets of captured pods that did not come from the proxy, dropped', (each) => each.guardDrops],
      flows: ['Connections of captured pods that are open now', (each) => BigInt(each.flows)],
      probe_connections: [
        'Connections of the kubelet that reached pods past the proxy',
        (each) => each.probeConnections,
      ],
      inherited_connections: [
        'Connections that were open before capture, still open',
        (each) => BigInt(each.inheritedConnections),
      ],
    } as const satisfies Record<string, readonly [string, (status: CaptureStatus) => bigint]>;
    // One look into the datapath a scrape.
    let captures: readonly CaptureStatus[] = [];
    new Gauge({
      name: 'ebbtide_agent_pods_in_kernel',
      help: 'Pods that the kernel captures',
      registers: [this.#registry],
      collect() {
        captures = sources.captures();
        this.set(captures.length);
      },
    });
    for (const [name, [help, read]] of Object.entries(figures)) {
      new Gauge({
        name: `ebbtide_agent_${name}`,
        help: `${help} (sum over the pods captured now)`,
        registers: [this.#registry],
        collect() {
          this.set(Number(captures.reduce((sum, each) => sum + read(each), 0n)));
        },
      });
    }
  }
}
