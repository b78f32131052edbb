/** The agent's face of native/capture: BPF programs and maps that capture pods, loaded, pinned and adopted. */

/** A pod as capture needs it. */
export interface CapturePod {
  /** Kubernetes pod UID; names the pod's pins. */
  readonly uid: string;
  /** Descriptor of the pod's network namespace, kept open by the caller during each call. */
  readonly netnsFd: number;
  /** The pod's addresses as text, IPv4 and IPv6; connections to them are the pod's own. */
  readonly addresses: readonly string[];
  /** Leave inbound connections alone (annotation bypass-inbound-capture). */
  readonly bypassInbound: boolean;
}

/** What a pinned pod looks like to an agent that starts and finds it. */
export interface AdoptedPod {
  readonly uid: string;
  /** SO_NETNS_COOKIE of the pod's network namespace. */
  readonly cookie: bigint;
  readonly state: 'prepared' | 'captured';
  readonly addresses: readonly string[];
}

/** State of one pod, read from the datapath: nothing here is remembered, all is asked. */
export interface CaptureStatus {
  readonly uid: string;
  readonly cookie: bigint;
  /** Whether connects are rewritten. */
  readonly outbound: boolean;
  /** Whether the sk_lookup link is attached to a living network namespace. */
  readonly inbound: boolean;
  /** `attached`, or why the host side of the veth is not guarded. */
  readonly guard: string;
  /** Listening sockets of the proxy that steering would pick, by role. */
  readonly listeners: { readonly outbound: number; readonly hbone: number; readonly plaintext: number };
  readonly capturedConnections: bigint;
  readonly steeredConnections: bigint;
  /** Connects refused with EPERM: no listener of the proxy was there, or the pod's share of flows was used up. */
  readonly refusedConnections: bigint;
  /** Connections published now; a pod may hold as many as are free for all others. */
  readonly flows: number;
  readonly guardDrops: bigint;
  /** Connections of the kubelet that reached the pod past the proxy. */
  readonly probeConnections: bigint;
  /** Connections open when the pod was captured, which stay as they were: number still open. */
  readonly inheritedConnections: number;
  /** CLOCK_BOOTTIME nanoseconds of the last captured or steered connection, 0n if none. */
  readonly lastCaptureNs: bigint;
}

/** What a pod's interfaces carried from their making until the pod was captured: all protocols, and none of it by the mesh. */
export interface BeforeCapture {
  readonly sentBytes: number;
  readonly receivedBytes: number;
  /** Connections that are open and stay as they were. */
  readonly inheritedConnections: number;
}

/** What was found missing in the kernel, and mended. */
export interface Repair {
  /** Pins that somebody had removed. */
  readonly repinned: number;
  /** Programs of the node that somebody had detached. */
  readonly reattached: number;
  /** Pods whose own programs are detached: `activate` attaches them again. */
  readonly pods: readonly string[];
}

/** Who was there before an agent that starts. */
export type CaptureOrigin = 'nothing' | 'boot guard' | 'agent';

/** What the agent knows of a pod before it exists: it will be captured, or left alone. */
export type PodVerdict = 'mesh' | 'plain';

/**
 * How pods that appear are held until they are decided about, and those of the mesh until they are captured; TCP only.
 * Needs the kernel's BTF and CAP_PERFMON: without them opening the capture throws. After a boot the node's pods may be
 * there before the agent; they are older, so not held, unless a boot guard was there before them.
 */
export interface HoldOptions {
  /**
   * What becomes of a new pod about which nothing is decided, also while no agent runs: `refuse` lets its TCP
   * connections fail with EPERM and drops those to it, `allow` lets all through in clear.
   */
  readonly undecided: 'refuse' | 'allow';
  /** Cgroup directory below which this node's pods are, where several nodes share a kernel; all if not given. */
  readonly podCgroup?: string;
}

/**
 * A pod whose cgroup was made since holding began. Entries vanish with the cgroup, that is when the pod is gone. Pods
 * that are older, and those in the node's own network namespace (hostNetwork), are never held.
 */
export interface HeldPod {
  /** As in the cgroup's name: of a static pod that is its annotation `kubernetes.io/config.hash`. */
  readonly uid: string;
  /** `none` if nothing is decided. */
  readonly verdict: PodVerdict | 'none';
  /** Whether it is held now. A hostNetwork pod counts as held until it is decided, although nothing is done to it. */
  readonly held: boolean;
  /** When its cgroup was made. */
  readonly since: Date;
  /** From then to the moment at which it was captured or decided to be plain, or to now. */
  readonly heldMs: number;
  /** Connects that failed with EPERM because nothing was decided. */
  readonly refusedConnects: number;
  /** Connects that wait, or waited, for the pod to be captured. */
  readonly delayedConnects: number;
  /** Packets to its listening sockets that were dropped; callers send them again. */
  readonly refusedInbound: number;
}

/** Sums over all pods that appeared since holding began, kept by the kernel over restarts of the agent. */
export interface HeldTotals {
  readonly pods: number;
  /** Pods for which the kernel had no room, and which were not held. More than none is an alarm. */
  readonly unseen: number;
  readonly refusedConnects: number;
  readonly delayedConnects: number;
  readonly refusedInbound: number;
}

export interface CaptureOptions {
  /** Root of the cgroup2 hierarchy. */
  readonly cgroup: string;
  /** Directory on a bpffs, of this agent alone; made if missing. Holds versioned subdirectories. */
  readonly pinDirectory: string;
  /** Guard by clsact as on kernels before 6.6, also where tcx is known. */
  readonly classicGuard?: boolean;
  /**
   * The node's network namespace, in which the host sides of the pods' veths are. Default: that of this process, which
   * is another one where the agent is a pod with a network of its own.
   */
  readonly hostNetns?: string;
  /** Hold new pods. Not given, none is held, and what an earlier agent decided is forgotten. */
  readonly hold?: HoldOptions;
}

/** Pin directories below the bpffs have this name, or begin with it and a dash: by that `ebbtide uninstall` finds them. */
export const PIN_DIRECTORY_NAME = 'ebbtide';

/** What the kernel refused. */
export class CaptureError extends Error {
  override readonly name = 'CaptureError';
  /** errno of the system call, 0 if none failed. */
  readonly errno: number;
  /** libbpf's messages with the verifier's log, empty if there are none. */
  readonly log: string;

  constructor(message: string, errno: number, log: string) {
    super(message);
    this.errno = errno;
    this.log = log;
  }
}

/**
 * One agent's capture. Errors are CaptureError with what was tried, errno, and the verifier's log where there is one.
 * Sequence for a pod: decide -> prepare -> (proxy opens its listeners in the pod's netns) -> activate -> ... ->
 * (drain -> proxy ends what is open ->) release -> forget.
 */
export interface Capture {
  /** The proxy behind this process id (as SO_PEERCRED told) may open listeners and state claims. */
  trustProxy(pid: number): void;
  distrustProxy(pid: number): void;
  /**
   * The process is the kubelet: its connections to the addresses of prepared pods reach the applications past the
   * proxy, from the network namespace in which it is now and no other. Call it when the agent starts and whenever the
   * process that owns the kubelet's port has become another. Trust dies with the process or when it is moved to
   * another cgroup. Throws CaptureError when the process is gone or in a pod's network namespace.
   */
  trustProber(pid: number): void;
  /** Connections that are open live on. */
  distrustProber(pid: number): void;
  /**
   * Decides about a pod, best before it exists, as soon as the API's watch tells that it is bound to this node (not
   * for hostNetwork pods, which may be decided `plain`). From its first instant a `plain` pod is free, and a `mesh` pod
   * held until `activate`: its connects take that much longer, packets to it are dropped. May be repeated. A plain pod
   * that runs stays free when it is decided `mesh`, until `activate`. `activate` and `release` decide by themselves.
   * After a start decide about every pod of the node, then `forget` what `decided` and `held` name and the API does not.
   * Nothing happens when nothing is held. Throws CaptureError when thousands are decided and none forgotten.
   */
  decide(uid: string, verdict: PodVerdict): void;
  /**
   * The pod is gone from the API, which is known because it was there or because the list is complete. If processes of
   * it still run, they are undecided again. Its entry in `held` goes if its cgroup is empty.
   */
  forget(uid: string): void;
  /** UIDs about which something is decided, by this agent or one before. */
  decided(): string[];
  /** Pods that appeared since holding began and are still there, held or not. */
  held(): HeldPod[];
  heldTotals(): HeldTotals;
  /** Makes the pod known so that the proxy's listeners in it are recognised; nothing is captured yet. Idempotent. */
  prepare(pod: CapturePod): void;
  /** Steers inbound connections, captures outbound ones, lists the inherited ones, guards the veth. Idempotent: undefined where it was captured already. */
  activate(pod: CapturePod): BeforeCapture | undefined;
  /**
   * New connections are the pod's own again, but for HBONE to it, of peers that have not learnt of it. The proxy may finish
   * what it has begun, and states claims as before, until `release`. Unknown uid is no error.
   */
  drain(uid: string): void;
  /** Lets the pod go at once: new connections are its own again, and the kernel knows it no more. Unknown uid is no error. */
  release(uid: string): void;
  /** Pods found pinned when this capture was opened. */
  adopted(): AdoptedPod[];
  /** Whose pins were there when this capture was opened: an agent's, a boot guard's that no agent had taken over from, none. */
  origin(): CaptureOrigin;
  /**
   * Looks whether all that was pinned still is, and whether all is attached. This object holds everything itself, so that
   * nothing goes with its pin. Throws CaptureError when pins cannot be made again.
   */
  repair(): Repair;
  /**
   * Takes away guards that an agent before this one left on the node where its pins were removed while none ran (kernels
   * before 6.6: a filter lives as long as its interface, and stops the TCP of a pod that nobody captures any more). To be
   * called when the pods that are wanted are captured. @returns how many there were
   */
  removeStrays(): number;
  status(): CaptureStatus[];
  /** Closes descriptors. `remove` also unpins and detaches everything, so that nothing is left in the kernel. */
  close(options: { readonly remove: boolean }): void;
}
