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
  /** Connections open when the pod was captured, which stay as they were: number still open. */
  readonly inheritedConnections: number;
  /** CLOCK_BOOTTIME nanoseconds of the last captured or steered connection, 0n if none. */
  readonly lastCaptureNs: bigint;
}

export interface CaptureOptions {
  /** Root of the cgroup2 hierarchy. */
  readonly cgroup: string;
  /** Directory on a bpffs, of this agent alone; made if missing. Holds versioned subdirectories. */
  readonly pinDirectory: string;
  /** Guard by clsact as on kernels before 6.6, also where tcx is known. For tests. */
  readonly classicGuard?: boolean;
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
 * Sequence for a pod: prepare -> (proxy opens its listeners in the pod's netns) -> activate -> ... -> release.
 */
export interface Capture {
  /** The proxy behind this process id (as SO_PEERCRED told) may open listeners and state claims. */
  trustProxy(pid: number): void;
  distrustProxy(pid: number): void;
  /** Makes the pod known so that the proxy's listeners in it are recognised; nothing is captured yet. Idempotent. */
  prepare(pod: CapturePod): void;
  /** Steers inbound connections, captures outbound ones, lists the inherited ones, guards the veth. Idempotent. */
  activate(pod: CapturePod): void;
  /** Lets the pod go: new connections are its own again. Unknown uid is no error. */
  release(uid: string): void;
  /** Pods found pinned when this capture was opened. */
  adopted(): AdoptedPod[];
  status(): CaptureStatus[];
  /** Closes descriptors. `remove` also unpins and detaches everything, so that nothing is left in the kernel. */
  close(options: { readonly remove: boolean }): void;
}
