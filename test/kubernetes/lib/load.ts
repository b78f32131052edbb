/** A load that runs in the cluster while something happens to the mesh, and what it counted. */
import type { Cluster } from './cluster.ts';
import { TOOLS_IMAGE } from './images.ts';

/** One line of programs/load.py; counts are cumulative. */
export interface LoadLine {
  readonly at: number;
  readonly ok: number;
  readonly failed: number;
  /** Held connections: opened, and broken. */
  readonly opened: number;
  readonly broken: number;
  readonly echoed: number;
  readonly slowestMs: number;
  readonly errors: Readonly<Record<string, number>>;
}

/** What happened between two looks. */
export interface LoadFigures {
  readonly ok: number;
  readonly failed: number;
  readonly broken: number;
  readonly slowestMs: number;
  readonly errors: string;
}

export interface LoadPodOptions {
  readonly name: string;
  readonly namespace: string;
  readonly node: string;
  /** Service or address that is asked. */
  readonly host: string;
  readonly port?: number;
  readonly workers?: number;
  readonly pauseMs?: number;
}

/** A pod that asks again and again. */
export function loadPod(options: LoadPodOptions): object {
  const { name, namespace, node, host, port = 9000, workers = 4, pauseMs = 20 } = options;
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name, namespace, labels: { app: name } },
    spec: {
      nodeName: node,
      terminationGracePeriodSeconds: 1,
      containers: [
        {
          name: 'load',
          image: TOOLS_IMAGE,
          imagePullPolicy: 'Never',
          command: ['python3', '/programs/load.py', host, `${port}`, `${workers}`, `${pauseMs}`],
        },
      ],
    },
  };
}

/** All lines of a load so far. */
export async function loadLines(cluster: Cluster, namespace: string, pod: string): Promise<LoadLine[]> {
  const text = await cluster.kubectl(['logs', '-n', namespace, pod]);
  return text
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => {
      const raw = JSON.parse(line) as Record<string, number> & { errors: Record<string, number> };
      const of = (name: string): number => raw[name] ?? 0;
      return {
        at: of('at'),
        ok: of('ok'),
        failed: of('failed'),
        opened: of('opened'),
        broken: of('broken'),
        echoed: of('echoed'),
        slowestMs: of('slowest_ms'),
        errors: raw.errors,
      };
    });
}

/** What the load counted since a time (seconds since 1970). */
export async function loadSince(cluster: Cluster, namespace: string, pod: string, since: number): Promise<LoadFigures> {
  const lines = await loadLines(cluster, namespace, pod);
  const before = lines.filter(({ at }) => at <= since).at(-1);
  const after = lines.filter(({ at }) => at > since);
  const last = after.at(-1);
  if (last === undefined) throw new Error(`the load ${namespace}/${pod} has said nothing since ${since}`);
  const errors = Object.entries(last.errors).filter(([what, n]) => n > (before?.errors[what] ?? 0));
  return {
    ok: last.ok - (before?.ok ?? 0),
    failed: last.failed - (before?.failed ?? 0),
    broken: last.broken - (before?.broken ?? 0),
    slowestMs: Math.max(...after.map(({ slowestMs }) => slowestMs)),
    errors: errors.map(([what, n]) => `${n} x ${what}`).join('; '),
  };
}

/** Seconds since 1970, as the load's lines have them. */
export const now = (): number => Date.now() / 1000;
