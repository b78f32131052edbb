/** Findings about BPF programs of others at the hooks that capture uses, and whether they can live beside it. */
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import {
  attachedToCgroup,
  type BpfLink,
  bpfLinks,
  bpfProgram,
  type CgroupPrograms,
  type InterfaceProgram,
  ingressPrograms,
  pinnedObjects,
} from '../../agent/capture-check.js';
import { closeFd, openNetns } from '../../agent/netns.js';
import { processIds } from '../../agent/proc.js';
import { type Finding, failed, notTried, ok, some, warning } from './finding.js';
import { isBpffs } from './machine.js';
import { pinDirectories } from './pins.js';

/** enum bpf_attach_type: BPF_SK_LOOKUP. */
const SK_LOOKUP = 36;
const ALLOW_MULTI = 2;
/** tc filters of our guard have this one (native/capture/guard.cc). */
const GUARD_PRIORITY = 0xebb;
/** They say yes or no, and change nothing: with us it takes two to say yes. */
const ONLY_DECIDE: readonly string[] = ['bind4', 'bind6', 'skb ingress', 'skb egress'];
const MAX_CGROUPS = 20_000;
/** Names of this mesh's programs, of whichever agent. */
const OUR_PREFIX = 'ebb_';

/** A program of somebody else. */
export interface Foreign {
  readonly id: number;
  readonly name: string;
  /** Where it is attached. */
  readonly place: string;
  readonly hook: string;
  readonly multi: boolean;
  readonly byLink: boolean;
  /** In the asked cgroup or above it, so that it decides whether ours may be attached. */
  readonly above: boolean;
  readonly owner: string;
}

/** What is asked of the kernel, so that the judgement can be tested without it. */
export interface ProgramView {
  readonly ours: ReadonlySet<number>;
  readonly links: readonly BpfLink[];
  name(id: number): string;
  owner(id: number): string;
}

export function viewOf(bpffs: string): ProgramView {
  const ours = new Set<number>();
  if (isBpffs(bpffs)) {
    for (const directory of pinDirectories(bpffs)) for (const id of pinnedObjects(directory).programs) ours.add(id);
  }
  let owners: ReadonlyMap<number, string> | undefined;
  return {
    ours,
    links: bpfLinks(),
    name: (id) => bpfProgram(id).name,
    owner(id) {
      owners ??= ownersOf();
      return owners.get(id) ?? 'owner unknown';
    },
  };
}

/** Whether a program is one of this mesh's, of this agent or another's. */
const isOurs = (view: ProgramView, id: number, name: string): boolean =>
  view.ours.has(id) || name.startsWith(OUR_PREFIX);

const describe = ({ hook, name, id, place, multi, byLink, owner }: Foreign): string =>
  `${hook} ${name || '(gone)'} (id ${id}, ${byLink ? 'link' : multi ? 'multi' : 'exclusive'}, ${owner}) at ${place}`;

/** Programs at cgroup2: of the directory, of those above it and of those below. */
export function cgroupPrograms(
  cgroup: string,
  view: ProgramView,
  attached: (path: string) => readonly CgroupPrograms[] = attachedToCgroup,
): { readonly foreign: readonly Foreign[]; readonly all: boolean } {
  const foreign: Foreign[] = [];
  const linked = new Set(view.links.filter(({ kind }) => kind === 'cgroup').map(({ program }) => program));
  const look = (path: string, above: boolean): void => {
    for (const { hook, attachFlags, programs } of attached(path)) {
      for (const id of programs) {
        const name = view.name(id);
        if (isOurs(view, id, name)) continue;
        const multi = (attachFlags & ALLOW_MULTI) !== 0;
        foreign.push({ id, name, hook, place: path, multi, above, byLink: linked.has(id), owner: view.owner(id) });
      }
    }
  };
  for (const path of upwards(cgroup)) look(path, true);
  const { paths, all } = below(cgroup);
  for (const path of paths) look(path, false);
  return { foreign, all };
}

export function cgroupProgramFinding({ foreign, all }: ReturnType<typeof cgroupPrograms>): Finding {
  const exclusive = foreign.filter(({ above, multi }) => above && !multi);
  if (exclusive.length > 0) {
    return failed(
      'CGROUP_PROGRAMS',
      `attached so that nobody else may be: ${some(exclusive.map(describe))}`,
      'end what attached it, or have it attach by a link or with BPF_F_ALLOW_MULTI',
    );
  }
  const changing = foreign.filter(({ hook }) => !ONLY_DECIDE.includes(hook));
  if (changing.length > 0) {
    return warning(
      'CGROUP_PROGRAMS',
      `run beside ours: ${some(changing.map(describe))}`,
      'harmless if they only watch; what rewrites addresses of connects in pods (socket load balancing) hides Services from the mesh',
    );
  }
  const partly = all ? '' : `; only the first ${MAX_CGROUPS} cgroups were looked at`;
  if (foreign.length === 0) return ok('CGROUP_PROGRAMS', `none of others${partly}`);
  return ok('CGROUP_PROGRAMS', `can live beside ours: ${some(foreign.map(describe))}${partly}`);
}

/** The directory and those above it, up to the mount point's. */
function upwards(cgroup: string): string[] {
  const paths = [cgroup];
  for (let path = dirname(cgroup); isCgroup2(path); path = dirname(path)) {
    paths.push(path);
    if (path === '/') break;
  }
  return paths;
}

function isCgroup2(path: string): boolean {
  try {
    return statSync(join(path, 'cgroup.controllers')).isFile();
  } catch {
    return false;
  }
}

function below(cgroup: string): { readonly paths: readonly string[]; readonly all: boolean } {
  const paths: string[] = [];
  const open = [cgroup];
  for (let next = open.pop(); next !== undefined; next = open.pop()) {
    let names: string[];
    try {
      names = readdirSync(next, { withFileTypes: true })
        .filter((entry) => entry.isDirectory())
        .map(({ name }) => name);
    } catch {
      continue; // Gone meanwhile.
    }
    for (const name of names) {
      if (paths.length >= MAX_CGROUPS) return { paths, all: false };
      paths.push(join(next, name));
      open.push(join(next, name));
    }
  }
  return { paths, all: true };
}

/** sk_lookup programs of others, in any network namespace. @param netnsOf a process in the namespace of this inode */
export function skLookupFinding(view: ProgramView, processIn: (inode: bigint) => string): Finding {
  const foreign = view.links.filter(
    ({ kind, attachType, program, target }) =>
      kind === 'netns' && attachType === SK_LOOKUP && target !== 0n && !isOurs(view, program, view.name(program)),
  );
  if (foreign.length === 0) return ok('SK_LOOKUP_PROGRAMS', 'none of others');
  const list = foreign.map(
    ({ program, target }) =>
      `${view.name(program)} (id ${program}, ${view.owner(program)}) in network namespace ${target}${processIn(target)}`,
  );
  return warning(
    'SK_LOOKUP_PROGRAMS',
    some(list),
    "in a pod of the mesh the last program that picks a socket wins, so another one can take connections from the proxy's listeners",
  );
}

/**
 * Programs of others at the ingress of the node's interfaces.
 * @param tcx whether the guard is attached by tcx, before all others
 */
export function ingressFinding(
  netns: string,
  view: ProgramView,
  tcx: boolean,
  ask: (netns: string) => readonly InterfaceProgram[] = ingressOf,
): Finding {
  let programs: readonly InterfaceProgram[];
  try {
    programs = ask(netns);
  } catch (error) {
    return notTried('INGRESS_PROGRAMS', (error as Error).message);
  }
  const foreign = programs.filter(({ program }) => !isOurs(view, program, view.name(program)));
  const list = some(
    foreign.map(
      ({ interface: name, how, priority, program }) =>
        `${name} ${how}${how === 'tc' ? ` priority ${priority}` : ''} ${view.name(program)} (id ${program}, ${view.owner(program)})`,
    ),
  );
  if (foreign.length === 0) return ok('INGRESS_PROGRAMS', 'none of others');
  if (tcx) return ok('INGRESS_PROGRAMS', `they run after the guard, which tcx puts first: ${list}`);
  const before = foreign.filter(({ how, priority }) => how === 'tc' && priority < GUARD_PRIORITY);
  if (before.length === 0) return ok('INGRESS_PROGRAMS', `they run after the guard: ${list}`);
  return warning(
    'INGRESS_PROGRAMS',
    `they run before the guard, which is attached by clsact here: ${list}`,
    'what they accept the guard does not see: give them a priority number above 3771, or use Linux 6.6 or newer',
  );
}

function ingressOf(netns: string): InterfaceProgram[] {
  const fd = openNetns(netns);
  try {
    return ingressPrograms(fd);
  } finally {
    closeFd(fd);
  }
}

/** Which process holds a program, or a link to it, by its descriptors. */
function ownersOf(proc = '/proc'): Map<number, string> {
  const owners = new Map<number, string>();
  for (const pid of processIds(proc)) {
    const directory = join(proc, String(pid));
    try {
      for (const fd of readdirSync(join(directory, 'fd'))) {
        if (!/bpf[-_](prog|link)/.test(readlinkSync(join(directory, 'fd', fd)))) continue;
        const id = /^prog_id:\s*(\d+)/m.exec(readFileSync(join(directory, 'fdinfo', fd), 'utf8'))?.[1];
        const name = readFileSync(join(directory, 'comm'), 'utf8').trim();
        if (id !== undefined && !owners.has(Number(id))) owners.set(Number(id), `of process ${pid} ${name}`);
      }
    } catch {
      // It has ended, or is not ours to look at.
    }
  }
  return owners;
}
