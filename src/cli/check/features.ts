/** Findings about what the kernel lets this process do, from trials of native/capture. Pure. */
import type { Trial } from '../../agent/capture-check.js';
import { type Code, type Finding, failed, notTried, ok, some, warning } from './finding.js';

const EPERM = 1;
const ENOMEM = 12;

/** libbpf's last words before its summary, or the verifier's: they tell the reason. */
function reasonOf({ message, log }: Trial): string {
  const lines = log.split('\n').map((each) => each.trim());
  const telling = lines.filter(
    (each) =>
      each !== '' &&
      !/^(libbpf: (failed|prog '.*': (BEGIN|-- (BEGIN|END)))|processed \d|-- (BEGIN|END)|max_states)/.test(each),
  );
  const last = telling.at(-1)?.replace(/^libbpf: /, '');
  return last === undefined ? message : `${message}: ${last}`;
}

/** What to do about a refusal, by its errno. */
function hintOf({ errno }: Trial): string {
  if (errno === EPERM) {
    return 'the kernel refused this process: see CAPABILITIES, APPARMOR, a seccomp profile, lockdown (cat /sys/kernel/security/lockdown)';
  }
  if (errno === ENOMEM) return 'more memory is needed: see the memory limit of the container or machine';
  return 'this kernel lacks it; Linux 5.15 is the oldest that has all, if it is configured as distributions do';
}

interface Group {
  readonly code: Code;
  readonly belongs: (name: string) => boolean;
  /** What works when all of the group does. */
  readonly works: (names: readonly string[]) => string;
  /** For what is optional: what is lost, and what serves instead. */
  readonly optional?: string;
}

const starting =
  (...beginnings: string[]) =>
  (name: string): boolean =>
    beginnings.some((beginning) => name.startsWith(beginning));
const STORAGE: readonly string[] = ['map:ebb_sockets', 'map:ebb_listening'];
const OF_HOLD = starting('object:hold', 'memory:hold', 'program:hold/', 'tracepoint:', 'cgroup:cgroup_skb/');
const HOLD_LOST =
  'new pods are not held until they are captured, so their first connections may be in clear; without it start the agent ' +
  'with --hold off (EBBTIDE_HOLD=off, in the chart agent.hold)';

const GROUPS: readonly Group[] = [
  {
    code: 'BPF_MAPS',
    belongs: (name) => starting('map:', 'object:')(name) && !OF_HOLD(name) && !STORAGE.includes(name),
    works: (names) => `${names.filter((name) => name.startsWith('map:')).length} kinds of maps made`,
  },
  {
    code: 'BPF_MEMORY',
    belongs: (name) => name.startsWith('memory:') && !OF_HOLD(name),
    works: () => 'all maps made in full size',
  },
  { code: 'SK_STORAGE', belongs: (name) => STORAGE.includes(name), works: () => 'made' },
  { code: 'NETNS_COOKIE', belongs: (name) => name === 'netns:cookie', works: () => 'asked of a new network namespace' },
  {
    code: 'CAPTURE_PROGRAMS',
    belongs: starting('program:capture/'),
    works: (names) => `${names.length} programs loaded`,
  },
  {
    code: 'CGROUP_LINKS',
    belongs: (name) => name.startsWith('cgroup:') && !OF_HOLD(name),
    works: (names) =>
      `attached and detached: ${names.map((name) => name.replace(/^cgroup:(cgroup\/)?/, '')).join(', ')}`,
  },
  { code: 'STEER_PROGRAM', belongs: starting('program:steer/'), works: () => 'loaded' },
  { code: 'SK_LOOKUP_LINK', belongs: (name) => name === 'netns:sk_lookup', works: () => 'attached and detached' },
  { code: 'GUARD_PROGRAM', belongs: starting('program:guard/'), works: () => 'loaded' },
  {
    code: 'HOLD',
    belongs: OF_HOLD,
    works: () => 'programs loaded, tracepoints and links attached and detached',
    optional: HOLD_LOST,
  },
];

/** Findings from the trials. A group of which nothing was tried says so. */
export function featureFindings(trials: readonly Trial[]): Finding[] {
  return [...GROUPS.map((group) => judge(group, trials)), guardFinding(trials)];
}

function judge({ code, belongs, works, optional }: Group, trials: readonly Trial[]): Finding {
  const ours = trials.filter(({ name }) => belongs(name));
  const bad = ours.filter(({ errno }) => errno !== 0);
  const [first] = bad;
  if (first !== undefined) {
    const names = bad.map(({ name }) => name.slice(name.indexOf(':') + 1));
    const seen = `${some(names)}: ${reasonOf(first)}`;
    return optional === undefined
      ? failed(code, seen, hintOf(first))
      : warning(code, seen, `${optional}. ${hintOf(first)}`);
  }
  if (ours.length === 0) return notTried(code, whyNot(code, trials));
  // Half of what it takes would be shown as whole.
  if (code === 'HOLD' && !ours.some(({ name }) => name.startsWith('cgroup:')))
    return notTried(code, whyNot(code, trials));
  return ok(code, works(ours.map(({ name }) => name)));
}

function whyNot(code: Code, trials: readonly Trial[]): string {
  const netns = trials.find(({ name, errno }) => name === 'netns:new' && errno !== 0);
  if (netns !== undefined && /^(NETNS|SK_LOOKUP|GUARD)/.test(code))
    return `no network namespace to try it in: ${netns.message}`;
  if (code === 'CGROUP_LINKS' || code === 'HOLD') return 'there is no cgroup to attach to, see CGROUP_ROOT';
  return 'the objects could not be opened, see BPF_MAPS';
}

function guardFinding(trials: readonly Trial[]): Finding {
  const tcx = trials.find(({ name }) => name === 'guard:tcx');
  const classic = trials.find(({ name }) => name === 'guard:classic');
  if (tcx === undefined || classic === undefined) return notTried('GUARD_LINK', whyNot('GUARD_LINK', trials));
  if (tcx.errno === 0)
    return ok('GUARD_LINK', `tcx attached and detached${classic.errno === 0 ? ', clsact as well' : ''}`);
  if (classic.errno === 0) {
    return warning(
      'GUARD_LINK',
      `clsact works, tcx does not: ${tcx.message}`,
      'the guard serves by clsact; filters of lower priority numbers at the same interface run before it (see INGRESS_PROGRAMS). ' +
        'Linux 6.6 has tcx',
    );
  }
  return failed(
    'GUARD_LINK',
    `${reasonOf(tcx)}; ${reasonOf(classic)}`,
    'without a guard, packets that root in a pod makes by hand leave the pod in clear: enable CONFIG_NET_CLS_BPF and ' +
      `CONFIG_NET_SCH_INGRESS. ${hintOf(classic)}`,
  );
}
