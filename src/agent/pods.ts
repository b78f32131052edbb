/** All pods of this node: which are wanted, by the manifests; which are here, by the kernel; and what becomes of each. */
import { decideEnrolment, type NotEnrolledReason } from '../mesh/enrolment.js';
import { addressesOf, namespaceOf, type Pod, serviceAccountOf } from '../mesh/kubernetes.js';
import {
  BYPASS_INBOUND_ANNOTATION,
  CONFIG_HASH_ANNOTATION,
  DNS_CAPTURE_ANNOTATION,
  EXCLUDED_NAMESPACES,
  MIRROR_ANNOTATION,
  NETNS_ANNOTATION,
  REDIRECTION_ANNOTATION,
} from '../mesh/labels.js';
import type { Logger } from '../mesh/log.js';
import type { Capture, CaptureStatus, HeldPod, PodVerdict } from './capture.js';
import { EnrolledPod, type PodProxies, type PodState, type WantedPod } from './enrolled-pod.js';
import type { NetnsFinder } from './pod-netns.js';
import type { NodeObjects } from './source.js';
import { type JudgedPod, Verdicts } from './verdicts.js';
import type { ZdsWorkload } from './zds-connection.js';
import type { ProxyView } from './zds-server.js';

/** A pod that was un-labelled is let go this much later, so that its peers learn first to speak plainly to it. */
export const UNLABEL_DELAY_MS = 500;
/** Paths of network namespaces are looked at again this often. */
const VERIFY_MS = 5000;
/** Whose a network namespace is, is looked up again this often: it belongs to one pod for as long as it lives. */
const OWNER_MS = 5000;

/** State of one pod of this node. */
export interface PodReport {
  readonly uid: string;
  readonly namespace: string;
  readonly name: string;
  /** Whether the pod belongs in the mesh. */
  readonly wanted: boolean;
  readonly state: PodState | 'not enrolled' | 'adopted';
  /** Why it is not enrolled, not captured yet, or without a proxy; empty where all is well. */
  readonly reason: string;
  /** From the datapath; undefined where the kernel does not know the pod. */
  readonly capture: CaptureStatus | undefined;
  /** How it was held until it was captured, where it came after holding began. */
  readonly held?: HeldPod;
}

/** A pod of this node in the light of what this process knows: cheap, the datapath is not asked. */
export interface PodOutlook {
  readonly uid: string;
  readonly namespace: string;
  readonly name: string;
  /** Whether the pod belongs in the mesh. */
  readonly wanted: boolean;
  readonly state: PodReport['state'];
  /** Whether the newest proxy serves it. */
  readonly served: boolean;
  /** As in the report. */
  readonly reason: string;
  /** Tries to enrol it that failed in a row. */
  readonly failedTries: number;
  /** Value of annotation ambient.istio.io/redirection as it was last seen. */
  readonly redirection: string | undefined;
}

export interface PodsOptions {
  readonly nodeName: string;
  /** Namespaces whose pods are never captured; default: kube-system. */
  readonly excludedNamespaces?: readonly string[];
  readonly capture: Capture;
  readonly proxies: PodProxies & { view(uid: string): ProxyView };
  readonly netns: NetnsFinder;
  readonly log: Logger;
  readonly random?: () => number;
  /** Called when a pod's state or reason is another one. */
  changed?(): void;
}

interface Seen {
  readonly uid: string;
  readonly namespace: string;
  readonly name: string;
  readonly reason: NotEnrolledReason | '';
  readonly pod: WantedPod;
  readonly redirection: string | undefined;
  /** An annotation that asks for what is not done. */
  readonly dnsCapture: string | undefined;
}

export class Pods {
  readonly #options: PodsOptions;
  readonly #enrolled = new Map<string, EnrolledPod>();
  /** Captured by an agent before this one, and not looked for yet. */
  readonly #adopted = new Set<string>();
  /** By SO_NETNS_COOKIE. */
  readonly #adoptedNetns = new Map<bigint, string>();
  readonly #verdicts: Verdicts;
  /** What was found last by {@link ofNetns}. */
  #netnsOwner: { readonly cookie: bigint; readonly name: string | undefined; readonly atMs: number } | undefined;
  #seen = new Map<string, Seen>();
  #verify: NodeJS.Timeout | undefined;
  /** Since the start of the process. */
  readonly counters = { failedTries: 0 };

  constructor(options: PodsOptions) {
    this.#options = options;
    this.#verdicts = new Verdicts(options.capture, options.log);
    for (const { uid, state, cookie } of options.capture.adopted()) {
      this.#adopted.add(uid);
      this.#adoptedNetns.set(cookie, uid);
      options.log.info({ event: 'pod_adopted', uid, state }, 'a pod is captured since before this agent');
    }
    this.#verify = setInterval(() => {
      for (const pod of this.#enrolled.values()) pod.verify();
    }, VERIFY_MS);
  }

  /**
   * Takes a whole state of the cluster.
   * @param complete false while a file cannot be read: a pod that is not there may be in it, so none is taken for deleted
   */
  apply(objects: NodeObjects, complete: boolean): void {
    const namespaces = new Map(objects.namespaces.map((namespace) => [namespace.metadata.name, namespace]));
    const seen = new Map<string, Seen>();
    const judged: JudgedPod[] = [];
    for (const pod of objects.pods) {
      if (pod.spec?.nodeName !== this.#options.nodeName) continue;
      const { uid, name } = pod.metadata;
      const namespace = namespaceOf(pod);
      const earlier = seen.get(uid);
      if (earlier !== undefined) {
        const other = `${earlier.namespace}/${earlier.name}`;
        this.#options.log.error({ event: 'uid_taken', uid, namespace, pod: name, other }, 'two pods have the same uid');
        continue;
      }
      const { excludedNamespaces = EXCLUDED_NAMESPACES } = this.#options;
      const decision = decideEnrolment(pod, namespaces.get(namespace), excludedNamespaces);
      const wanted = wantedOf(pod);
      const dnsCapture = pod.metadata.annotations?.[DNS_CAPTURE_ANNOTATION];
      const redirection = pod.metadata.annotations?.[REDIRECTION_ANNOTATION];
      const reason = decision.enrol ? '' : decision.reason;
      judged.push({ cgroupUid: wanted.cgroupUid, verdict: verdictOf(pod, reason, namespaces.has(namespace)) });
      seen.set(uid, { uid, namespace, name, reason, pod: wanted, redirection, dnsCapture });
      if (decision.enrol && dnsCapture !== this.#seen.get(uid)?.dnsCapture) this.#noteDns(pod, dnsCapture);
      if (decision.enrol) this.#want(wanted);
      else this.#unwant(wanted, decision.reason);
    }
    this.#seen = seen;
    this.#verdicts.apply(judged, complete);
    if (complete) this.#forget();
  }

  /** What proxies are to be told of. */
  workloads(): ZdsWorkload[] {
    const told: ZdsWorkload[] = [...this.#enrolled.values()].filter((pod) => pod.isTold);
    for (const uid of this.#adopted) {
      told.push({ uid, name: '', namespace: '', serviceAccount: '', netnsFd: () => undefined });
    }
    return told;
  }

  /** The pod of this node whose network namespace has this cookie, in the mesh or not; undefined where it is no pod's. */
  ofNetns(cookie: bigint): string | undefined {
    for (const pod of this.#enrolled.values()) {
      if (pod.netnsCookie === cookie) return `${pod.namespace}/${pod.name}`;
    }
    const adopted = this.#adoptedNetns.get(cookie);
    if (adopted !== undefined) return adopted;
    const now = performance.now();
    const known = this.#netnsOwner;
    // Asked every second of each process that is not beside the agent; to look through all pods takes a while.
    if (known?.cookie === cookie && now - known.atMs < (known.name === undefined ? OWNER_MS / 5 : OWNER_MS)) {
      return known.name;
    }
    const name = this.#searchOwner(cookie);
    this.#netnsOwner = { cookie, name, atMs: now };
    return name;
  }

  #searchOwner(cookie: bigint): string | undefined {
    for (const { namespace, name, pod } of this.#seen.values()) {
      if (pod.addresses.length === 0) continue;
      try {
        const netns = this.#options.netns.open(pod);
        this.#options.netns.close(netns);
        if (netns.cookie === cookie) return `${namespace}/${name}`;
      } catch {
        // A pod without a namespace has no process in it either.
      }
    }
    return undefined;
  }

  /** Every pod of this node, with what the datapath says of those it knows. */
  report(): PodReport[] {
    const captures = new Map(this.#options.capture.status().map((status) => [status.uid, status]));
    const held = new Map(this.#options.capture.held().map((pod) => [pod.uid, pod]));
    const reports: PodReport[] = [];
    for (const { uid, namespace, name, reason, pod: wanted } of this.#seen.values()) {
      const pod = this.#enrolled.get(uid);
      const capture = captures.get(uid);
      const holding = held.get(wanted.cgroupUid);
      const heldPart = holding === undefined ? {} : { held: holding };
      if (pod === undefined) {
        const state = this.#adopted.has(uid) ? 'adopted' : 'not enrolled';
        reports.push({ uid, namespace, name, wanted: reason === '', state, reason, capture, ...heldPart });
      } else reports.push({ ...this.#describe(pod), wanted: reason === '', capture, ...heldPart });
    }
    for (const pod of this.#enrolled.values()) {
      if (this.#seen.has(pod.uid)) continue;
      reports.push({ ...this.#describe(pod), wanted: false, capture: captures.get(pod.uid) });
    }
    for (const uid of this.#adopted) {
      if (this.#seen.has(uid)) continue;
      const reason = 'kept: a manifest that cannot be read may be its own';
      const pod = { uid, namespace: '', name: '', wanted: false, state: 'adopted', reason } as const;
      reports.push({ ...pod, capture: captures.get(uid) });
    }
    return reports;
  }

  /** Every pod of this node that its manifests or the API tell of, without asking the datapath. */
  outlooks(): PodOutlook[] {
    return [...this.#seen.values()].map(({ uid, namespace, name, reason, redirection }) => {
      const pod = this.#enrolled.get(uid);
      const served = pod?.state === 'captured' && this.#options.proxies.view(uid).serves;
      const own =
        pod === undefined
          ? ({ state: this.#adopted.has(uid) ? 'adopted' : 'not enrolled', reason } as const)
          : this.#describe(pod);
      const failedTries = pod?.failedTries ?? 0;
      const { state } = own;
      return {
        uid,
        namespace,
        name,
        wanted: reason === '',
        state,
        served,
        reason: own.reason,
        failedTries,
        redirection,
      };
    });
  }

  /** The programs of a captured pod are gone from the kernel. */
  captureAgain(uid: string): void {
    this.#enrolled.get(uid)?.captureAgain();
  }

  /** Lets every pod go at once and tells the proxies. Resolves when these have answered. */
  async releaseAll(): Promise<void> {
    const uids = [...this.#enrolled.keys()];
    this.stop();
    for (const uid of [...uids, ...this.#adopted]) this.#options.capture.release(uid);
    await Promise.all(uids.map((uid) => this.#options.proxies.del(uid)));
  }

  /** Stops all timers; leaves the kernel as it is. */
  stop(): void {
    clearInterval(this.#verify);
    for (const pod of this.#enrolled.values()) pod.stop();
    this.#enrolled.clear();
  }

  #describe(pod: EnrolledPod): Omit<PodReport, 'wanted' | 'capture'> {
    const { uid, namespace, name, state } = pod;
    const view = this.#options.proxies.view(uid);
    const proxyReason = state !== 'captured' || view.serves ? '' : view.reason;
    return { uid, namespace, name, state, reason: pod.reason || proxyReason };
  }

  #want(wanted: WantedPod): void {
    (this.#enrolled.get(wanted.uid) ?? this.#enrol(wanted)).want(wanted);
  }

  #enrol(pod: WantedPod): EnrolledPod {
    const { capture, proxies, netns, log, random } = this.#options;
    const enrolled = new EnrolledPod(pod, {
      capture,
      proxies,
      netns,
      log,
      adopted: this.#adopted.delete(pod.uid),
      ...(random === undefined ? {} : { random }),
      failed: () => this.counters.failedTries++,
      changed: () => this.#options.changed?.(),
      left: ({ uid }) => {
        this.#enrolled.delete(uid);
        this.#options.changed?.();
      },
    });
    this.#enrolled.set(pod.uid, enrolled);
    return enrolled;
  }

  /** The pod is let go, also where an agent before this one captured it. */
  #unwant(pod: WantedPod, reason: NotEnrolledReason): void {
    // Kubernetes takes the addresses away while a pod ends; its phase will tell.
    if (reason === 'has no address yet') return;
    const known = this.#enrolled.get(pod.uid) ?? (this.#adopted.has(pod.uid) ? this.#enrol(pod) : undefined);
    known?.leave(reason, reason === 'has ended' ? 0 : UNLABEL_DELAY_MS);
  }

  #noteDns(pod: Pod, value: string | undefined): void {
    if (value === undefined) return;
    const { uid, name } = pod.metadata;
    this.#options.log.info(
      {
        event: 'annotation_ignored',
        uid,
        namespace: namespaceOf(pod),
        pod: name,
        annotation: DNS_CAPTURE_ANNOTATION,
        value,
      },
      'DNS is not captured, whatever this annotation says',
    );
  }

  /** Lets go what is in no manifest any more. */
  #forget(): void {
    for (const pod of [...this.#enrolled.values()]) if (!this.#seen.has(pod.uid)) pod.leave('deleted', 0);
    for (const uid of [...this.#adopted]) if (!this.#seen.has(uid)) this.#drop(uid);
  }

  /** Of a pod that is gone, and was captured by an agent before this one. */
  #drop(uid: string): void {
    try {
      this.#options.capture.release(uid);
      this.#adopted.delete(uid);
      void this.#options.proxies.del(uid);
      this.#options.log.info(
        { event: 'adopted_pod_released', uid, reason: 'deleted' },
        'a pod captured before is let go',
      );
    } catch (error) {
      this.#options.log.error({ event: 'release_failed', uid, err: error }, 'a pod captured before cannot be let go');
    }
  }
}

/** What is decided about a pod before it runs; undefined while its namespace is not known, which may be labelled. */
function verdictOf(pod: Pod, reason: NotEnrolledReason | '', namespaceKnown: boolean): PodVerdict | undefined {
  if (reason === '' || (reason === 'has no address yet' && pod.spec?.hostNetwork !== true)) return 'mesh';
  return namespaceKnown || reason !== 'not labelled' ? 'plain' : undefined;
}

/** What Go's strconv.ParseBool takes for true, by which Istio reads the annotation. */
const TRUE: readonly string[] = ['1', 't', 'T', 'TRUE', 'true', 'True'];

function wantedOf(pod: Pod): WantedPod {
  const annotations = pod.metadata.annotations ?? {};
  return {
    uid: pod.metadata.uid,
    namespace: namespaceOf(pod),
    name: pod.metadata.name,
    serviceAccount: serviceAccountOf(pod),
    netnsPath: annotations[NETNS_ANNOTATION] || undefined,
    cgroupUid: (annotations[MIRROR_ANNOTATION] && annotations[CONFIG_HASH_ANNOTATION]) || pod.metadata.uid,
    addresses: addressesOf(pod),
    bypassInbound: TRUE.includes(annotations[BYPASS_INBOUND_ANNOTATION] ?? ''),
  };
}
