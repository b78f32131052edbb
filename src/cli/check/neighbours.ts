/** Other meshes and CNIs that are known to act on the same pods: found by programs, by files of the node, by processes. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { processIds } from '../../agent/proc.js';
import { type Code, type Finding, failed, ok, some, warning } from './finding.js';
import type { Foreign } from './programs.js';

/** What is looked at. */
export interface Surroundings {
  /** Programs of others at cgroup2. */
  readonly programs: readonly Foreign[];
  /** Of the node's own file system. */
  exists(path: string): boolean;
  /** CNI configurations of the node: name and text. */
  readonly cni: readonly { readonly name: string; readonly text: string }[];
  /** Processes by name, as far as they are seen. */
  readonly processes: readonly { readonly pid: number; readonly name: string }[];
}

interface Neighbour {
  readonly code: Code;
  readonly name: string;
  readonly programs: RegExp;
  readonly files: readonly string[];
  readonly cni: RegExp;
  readonly processes: readonly string[];
  judge(signs: Signs): { readonly result: 'ok' | 'warning' | 'failed'; readonly hint: string };
}

interface Signs {
  readonly programs: readonly string[];
  readonly processes: readonly string[];
  readonly others: readonly string[];
}

const NEIGHBOURS: readonly Neighbour[] = [
  {
    code: 'CILIUM',
    name: 'Cilium',
    programs: /^cil_|^sock[46]_(connect|xlate)/,
    files: ['/var/run/cilium/cilium.sock', '/sys/fs/bpf/cilium', '/opt/cni/bin/cilium-cni'],
    cni: /"type"\s*:\s*"cilium-cni"/,
    processes: ['cilium-agent'],
    judge: ({ programs }) =>
      programs.length === 0
        ? { result: 'ok', hint: '' }
        : {
            result: 'warning',
            hint:
              'its socket load balancing rewrites connects of pods before the mesh knows the Service: set ' +
              'socketLB.hostNamespaceOnly=true in Cilium (whether it is set, its programs do not show)',
          },
  },
  {
    code: 'ISTIO',
    name: "Istio's ambient mode",
    programs: /^$/,
    files: ['/opt/cni/bin/istio-cni', '/var/run/istio-cni'],
    cni: /"type"\s*:\s*"istio-cni"/,
    processes: ['ztunnel', 'install-cni'],
    judge: ({ processes, others }) =>
      processes.length > 0 || others.some((each) => each.includes('CNI'))
        ? {
            result: 'failed',
            hint:
              'istio-cni captures the pods of the same labels, and listens for a ztunnel at the same socket: uninstall it from this ' +
              'node first (README, Moving from Istio ambient)',
          }
        : { result: 'warning', hint: 'files of it are left, nothing of it runs: remove them' },
  },
  {
    code: 'KMESH',
    name: 'Kmesh',
    programs: /^$/,
    files: ['/sys/fs/bpf/bpf_kmesh', '/sys/fs/bpf/bpf_kmesh_workload', '/mnt/kmesh_cgroup2', '/opt/cni/bin/kmesh-cni'],
    cni: /"type"\s*:\s*"kmesh-cni"/,
    processes: ['kmesh-daemon'],
    judge: () => ({
      result: 'warning',
      hint: 'a pod must belong to one of the two only: namespaces of istio.io/dataplane-mode=kmesh are none of this mesh',
    }),
  },
];

const MOST_PROCESSES = 100_000;
const CNI_DIRECTORY = '/etc/cni/net.d';

/** One finding a neighbour, with all signs of it. */
export function neighbourFindings(surroundings: Surroundings): Finding[] {
  return NEIGHBOURS.map((neighbour) => {
    const programs = surroundings.programs
      .filter(({ name }) => neighbour.programs.test(name))
      .map(({ name, id, place }) => `program ${name} (id ${id}) at ${place}`);
    const processes = surroundings.processes
      .filter(({ name }) => neighbour.processes.includes(name))
      .map(({ name, pid }) => `process ${pid} ${name}`);
    const cni = surroundings.cni
      .filter(({ text }) => neighbour.cni.test(text))
      .map(({ name }) => `CNI configuration ${name}`);
    const others = [...cni, ...neighbour.files.filter(surroundings.exists)];
    const signs = [...programs, ...processes, ...others];
    if (signs.length === 0) return ok(neighbour.code, 'no sign of it');
    const { result, hint } = neighbour.judge({ programs, processes, others });
    const seen = some(signs, 5);
    if (result === 'failed') return failed(neighbour.code, seen, hint);
    return result === 'warning' ? warning(neighbour.code, seen, hint) : ok(neighbour.code, seen);
  });
}

/** @param root the node's own file system, as a path of this process */
export function surroundingsOf(programs: readonly Foreign[], root: string, proc = '/proc'): Surroundings {
  const cni: { name: string; text: string }[] = [];
  const directory = join(root, CNI_DIRECTORY);
  for (const name of existsSync(directory) ? readdirSync(directory) : []) {
    try {
      if (/\.(conf|conflist|json)$/.test(name)) cni.push({ name, text: readFileSync(join(directory, name), 'utf8') });
    } catch {
      // It went meanwhile.
    }
  }
  const processes: { pid: number; name: string }[] = [];
  for (const pid of processIds(proc)) {
    if (processes.length >= MOST_PROCESSES) break;
    try {
      processes.push({ pid, name: readFileSync(join(proc, String(pid), 'comm'), 'utf8').trim() });
    } catch {
      // It has ended.
    }
  }
  return { programs, cni, processes, exists: (path) => existsSync(join(root, path)) };
}
