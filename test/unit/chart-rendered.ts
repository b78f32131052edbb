/** The chart as helm renders it, for tests. */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseAllDocuments } from 'yaml';

export const DAEMONSET = fileURLToPath(new URL('../../daemonset', import.meta.url));
export const CHART = join(DAEMONSET, 'chart');
const BINARIES = fileURLToPath(new URL('../kubernetes/binaries.sh', import.meta.url));

/** Helm by env HELM, from the cache of test/kubernetes/binaries.sh, or on PATH; undefined where there is none. */
export function findHelm(): string | undefined {
  const named = process.env['HELM'];
  if (named !== undefined) return named;
  if (existsSync(BINARIES)) {
    const { status, stdout } = spawnSync('bash', [BINARIES, '--cached'], { encoding: 'utf8' });
    if (status === 0) return join(stdout.trim(), 'helm');
  }
  return spawnSync('helm', ['version']).status === 0 ? 'helm' : undefined;
}

/** What the tests read of Kubernetes objects. */
export interface Container {
  readonly name: string;
  readonly image: string;
  readonly args: readonly string[];
  readonly env: readonly { readonly name: string; readonly value?: string; readonly valueFrom?: unknown }[];
  readonly ports?: readonly { readonly name: string; readonly containerPort: number }[];
  readonly readinessProbe?: Readonly<Record<string, unknown>>;
  readonly livenessProbe?: unknown;
  readonly startupProbe?: unknown;
  readonly volumeMounts: readonly {
    readonly name: string;
    readonly mountPath: string;
    readonly readOnly?: boolean;
    readonly mountPropagation?: string;
  }[];
  readonly securityContext: {
    readonly privileged?: boolean;
    readonly allowPrivilegeEscalation?: boolean;
    readonly readOnlyRootFilesystem?: boolean;
    readonly runAsUser?: number;
    readonly runAsGroup?: number;
    readonly capabilities: { readonly drop?: readonly string[]; readonly add?: readonly string[] };
    readonly seccompProfile?: { readonly type: string };
    readonly appArmorProfile?: { readonly type: string };
    readonly seLinuxOptions?: Readonly<Record<string, string>>;
  };
}

export interface Rule {
  readonly apiGroups: readonly string[];
  readonly resources: readonly string[];
  readonly resourceNames?: readonly string[];
  readonly verbs: readonly string[];
}

type Values = Readonly<Record<string, string>>;

export interface PodSpec {
  readonly serviceAccountName: string;
  readonly automountServiceAccountToken?: boolean;
  readonly hostNetwork?: boolean;
  readonly hostPID?: boolean;
  readonly hostIPC?: boolean;
  readonly priorityClassName?: string;
  readonly terminationGracePeriodSeconds?: number;
  readonly tolerations?: readonly Values[];
  readonly securityContext?: { readonly runAsNonRoot?: boolean; readonly runAsUser?: number };
  readonly topologySpreadConstraints?: readonly { readonly topologyKey: string }[];
  readonly initContainers?: readonly Container[];
  readonly containers: readonly Container[];
  readonly volumes: readonly ({ readonly name: string } & Readonly<Record<string, unknown>>)[];
}

export interface KubernetesObject {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: {
    readonly name: string;
    readonly namespace?: string;
    readonly labels?: Values;
    readonly annotations?: Values;
  };
  readonly rules?: readonly Rule[];
  readonly roleRef?: Values;
  readonly subjects?: readonly Values[];
  readonly automountServiceAccountToken?: boolean;
  readonly data?: Values;
  readonly spec: {
    readonly replicas?: number;
    readonly selector: Values & { readonly matchLabels: Values };
    readonly updateStrategy?: { readonly rollingUpdate: Readonly<Record<string, unknown>> };
    readonly template: { readonly metadata: { readonly labels: Values }; readonly spec: PodSpec };
    readonly ports?: readonly { readonly port: number; readonly targetPort: string }[];
    readonly podMetricsEndpoints?: readonly { readonly port: string }[];
    readonly groups?: readonly { readonly rules: readonly { readonly alert: string; readonly expr: string }[] }[];
  };
}

export function parseObjects(text: string): KubernetesObject[] {
  return parseAllDocuments(text)
    .map((document) => {
      if (document.errors.length > 0) throw document.errors[0];
      return document.toJS() as KubernetesObject | null;
    })
    .filter((object) => object !== null);
}

/** Renders the chart. @throws Error with helm's words */
export function render(helm: string, argv: readonly string[] = [], namespace = 'ebbtide-system'): KubernetesObject[] {
  const command = ['template', 'ebbtide', CHART, '--namespace', namespace, '--kube-version', '1.30.0', ...argv];
  return parseObjects(execFileSync(helm, command, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }));
}

/** The one object of a kind and name. */
export function object(objects: readonly KubernetesObject[], kind: string, name: string): KubernetesObject {
  const found = objects.filter((each) => each.kind === kind && each.metadata.name === name);
  if (found.length !== 1 || found[0] === undefined) throw new Error(`${found.length} objects are ${kind} ${name}`);
  return found[0];
}

export function container(objects: readonly KubernetesObject[], name: string): Container {
  const pods = objects
    .filter(({ kind }) => kind === 'DaemonSet' || kind === 'Deployment')
    .map(({ spec }) => spec.template.spec);
  const found = pods.flatMap(({ containers }) => containers).find((each) => each.name === name);
  if (found === undefined) throw new Error(`no container ${name}`);
  return found;
}

/** Environment of a container, for variables that have a value. */
export const environment = ({ env }: Container): Map<string, string | undefined> =>
  new Map(env.map(({ name, value }) => [name, value]));
