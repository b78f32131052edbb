/** What `ebbtide check` says: findings, each with a code that stays the same from version to version. */

export type Result = 'ok' | 'warning' | 'failed' | 'not tried';

/**
 * Every code with what it is about. `worst` is the worst that it can say: what only ever warns keeps nothing from running.
 * The README's table is this one.
 */
export const CODES = {
  KERNEL_RELEASE: { about: 'release of the kernel; nothing is decided by it', worst: 'ok' },
  CAPABILITIES: { about: 'capabilities of this process', worst: 'failed' },
  APPARMOR: { about: 'an AppArmor profile that is enforced on this process', worst: 'warning' },
  CGROUP_ROOT: { about: 'root of cgroup2, on hosts of v2 and hybrid ones', worst: 'failed' },
  BPFFS: { about: 'a bpffs in which something can be pinned', worst: 'failed' },
  BPF_MAPS: { about: "each of capture's maps can be made", worst: 'failed' },
  BPF_MEMORY: { about: 'the maps in full size fit into memory and its limits', worst: 'failed' },
  SK_STORAGE: { about: 'storage of sockets', worst: 'failed' },
  NETNS_COOKIE: { about: 'cookies of network namespaces', worst: 'failed' },
  CAPTURE_PROGRAMS: { about: 'programs for cgroup2 pass the verifier', worst: 'failed' },
  CGROUP_LINKS: { about: 'links to cgroup2 beside what is attached there', worst: 'failed' },
  STEER_PROGRAM: { about: 'the sk_lookup program passes the verifier', worst: 'failed' },
  SK_LOOKUP_LINK: { about: 'sk_lookup links to network namespaces', worst: 'failed' },
  GUARD_PROGRAM: { about: "the guard's program passes the verifier", worst: 'failed' },
  GUARD_LINK: { about: 'tcx, or else clsact, for the guard', worst: 'failed' },
  BTF: { about: "the kernel's types, for holding new pods", worst: 'warning' },
  HOLD: { about: 'holding of new pods until they are captured: programs, tracepoints, links', worst: 'warning' },
  BPF_JIT: { about: 'programs are compiled, not interpreted', worst: 'warning' },
  UNPRIVILEGED_BPF: { about: 'users without rights cannot load programs', worst: 'warning' },
  DESCRIPTORS: { about: 'limit of descriptors against what the proxy needs', worst: 'failed' },
  PORT_RANGE: {
    about: "pods' ephemeral ports are clear of those that captured connections are sent to",
    worst: 'warning',
  },
  PORTS: { about: "the proxy's and the agent's own ports in this network namespace", worst: 'failed' },
  PINS: { about: 'pins of an agent of this version, or of another', worst: 'failed' },
  CGROUP_PROGRAMS: { about: "somebody else's programs at capture's hooks of cgroup2", worst: 'failed' },
  SK_LOOKUP_PROGRAMS: { about: "somebody else's sk_lookup programs in network namespaces", worst: 'warning' },
  INGRESS_PROGRAMS: { about: "somebody else's programs at the interfaces where the guard is", worst: 'warning' },
  CILIUM: { about: 'Cilium, whose socket load balancing must leave pods alone', worst: 'warning' },
  ISTIO: { about: "Istio's ambient mode, which captures the same pods", worst: 'failed' },
  KMESH: { about: 'Kmesh, which rewrites the same connects', worst: 'warning' },
  CONTROLLER: {
    about: 'the controller is reached and its certificate is of the root that is trusted',
    worst: 'failed',
  },
  CLOCK_SKEW: { about: "this machine's clock against the controller's and the Kubernetes API's", worst: 'failed' },
  KUBERNETES_API: { about: 'the Kubernetes API is reached', worst: 'warning' },
  NETWORK_POLICIES: { about: 'NetworkPolicies let TCP 15008 through between pods of the mesh', worst: 'failed' },
  CA_ROOT: { about: "root certificates in the namespaces of the mesh are the controller's", worst: 'failed' },
} as const satisfies Readonly<Record<string, { readonly about: string; readonly worst: Result }>>;

export type Code = keyof typeof CODES;

export interface Finding {
  readonly code: Code;
  readonly result: Result;
  /** What was seen; for `not tried` why it was not. One line. */
  readonly seen: string;
  /** What to do, "" where nothing is to be done. */
  readonly hint: string;
}

/** Longest text of a finding: a verifier's log is no finding. */
const MAX_TEXT = 1000;

const line = (text: string): string => text.replace(/\s+/g, ' ').trim().slice(0, MAX_TEXT);

const finding =
  (result: Result) =>
  (code: Code, seen: string, hint: string): Finding => ({ code, result, seen: line(seen), hint: line(hint) });

export const warning = finding('warning');
export const failed = finding('failed');
const good = finding('ok');
const untried = finding('not tried');
export const ok = (code: Code, seen: string, hint = ''): Finding => good(code, seen, hint);
export const notTried = (code: Code, why: string, hint = ''): Finding => untried(code, why, hint);

const ORDER = Object.keys(CODES);

/** As the table of codes has them. */
export const inOrder = (findings: readonly Finding[]): Finding[] =>
  [...findings].sort((a, b) => ORDER.indexOf(a.code) - ORDER.indexOf(b.code));

/** A few of many names, and how many others there are. */
export function some(names: readonly string[], most = 3): string {
  const rest = names.length - most;
  return names.slice(0, most).join(', ') + (rest > 0 ? ` and ${rest} more` : '');
}
