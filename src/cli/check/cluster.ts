/** Findings that take the Kubernetes API: who else is there, NetworkPolicies, the published root. Only what may be read is. */
import { X509Certificate } from 'node:crypto';
import { type Api, ApiError, openApi } from '../../mesh/api/index.js';
import type { ClockOffset } from '../../mesh/clock.js';
import { decideEnrolment } from '../../mesh/enrolment.js';
import { type Namespace, namespaceOf, type Pod } from '../../mesh/kubernetes.js';
import { ROOT_CONFIG_MAP, ROOT_CONFIG_MAP_KEY } from '../../mesh/labels.js';
import { splitPem } from '../../mesh/pem.js';
import { type Finding, failed, notTried, ok, some, warning } from './finding.js';
import { blockedPods, type NetworkPolicy } from './network-policies.js';

const TIMEOUT_MS = 10_000;
const PAGE = 500;
/** Pods of these labels are other meshes' and CNIs'. */
const OTHERS = [
  { what: 'ztunnel', label: 'app', value: 'ztunnel' },
  { what: 'istio-cni', label: 'k8s-app', value: 'istio-cni-node' },
  { what: 'Cilium', label: 'k8s-app', value: 'cilium' },
  { what: 'Kmesh', label: 'app', value: 'kmesh' },
] as const;

export interface ClusterOptions {
  readonly kubeconfig: string | undefined;
  /** PEM of the roots that vouch for the controller that was asked, where one was. */
  readonly controllerRoots: string | undefined;
}

export interface ClusterFindings {
  readonly findings: readonly Finding[];
  readonly offset: ClockOffset | undefined;
}

interface List<T> {
  readonly items?: readonly T[];
  readonly metadata?: { readonly continue?: string };
}

export async function clusterFindings({ kubeconfig, controllerRoots }: ClusterOptions): Promise<ClusterFindings> {
  if (kubeconfig === undefined && !process.env['KUBERNETES_SERVICE_HOST']) {
    const why = 'this is no pod, and no --kubeconfig is given';
    return {
      findings: [notTried('KUBERNETES_API', why), ...skipped('the Kubernetes API was not asked')],
      offset: undefined,
    };
  }
  let offset: ClockOffset | undefined;
  let api: Api | undefined;
  try {
    api = openApi({ kubeconfig, userAgent: 'ebbtide-check', onTime: (told) => (offset = told ?? offset) });
    const { gitVersion } = await api.request<{ gitVersion?: string }>('GET', '/version', { timeoutMs: TIMEOUT_MS });
    const seen = `Kubernetes ${gitVersion ?? '(no version)'} by ${api.description}`;
    const pods = await listed<Pod>(api, '/api/v1/pods');
    const namespaces = await listed<Namespace>(api, '/api/v1/namespaces');
    const members = pods === undefined || namespaces === undefined ? undefined : inMesh(pods, namespaces);
    return {
      findings: [
        apiFinding(seen, pods),
        await policyFinding(api, members),
        await rootFinding(api, members, controllerRoots),
      ],
      offset,
    };
  } catch (error) {
    const hint = 'check that the API server is reached from this node, and the rights of the token or kubeconfig';
    return {
      findings: [
        warning('KUBERNETES_API', (error as Error).message, hint),
        ...skipped('the Kubernetes API cannot be asked'),
      ],
      offset,
    };
  } finally {
    api?.close();
  }
}

const skipped = (why: string): Finding[] => [notTried('NETWORK_POLICIES', why), notTried('CA_ROOT', why)];

/** All objects of a list. @returns undefined where this process has no right to it. @throws ApiError for anything else */
async function listed<T>(api: Api, path: string, query: Record<string, string> = {}): Promise<T[] | undefined> {
  const items: T[] = [];
  let token: string | undefined;
  do {
    try {
      const page: List<T> = await api.request('GET', path, {
        query: { limit: PAGE, continue: token, ...query },
        timeoutMs: TIMEOUT_MS,
      });
      items.push(...(page.items ?? []));
      token = page.metadata?.continue || undefined;
    } catch (error) {
      if (error instanceof ApiError && error.status === 403) return undefined;
      throw error;
    }
  } while (token !== undefined);
  return items;
}

function inMesh(pods: readonly Pod[], namespaces: readonly Namespace[]): Pod[] {
  const byName = new Map(namespaces.map((namespace) => [namespace.metadata.name, namespace]));
  return pods.filter((pod) => decideEnrolment(pod, byName.get(namespaceOf(pod))).enrol);
}

function apiFinding(seen: string, pods: readonly Pod[] | undefined): Finding {
  if (pods === undefined) return ok('KUBERNETES_API', `${seen}; it may not list pods`);
  const others = OTHERS.map(({ what, label, value }) => ({
    what,
    count: pods.filter(({ metadata }) => metadata.labels?.[label] === value).length,
  })).filter(({ count }) => count > 0);
  if (others.length === 0) return ok('KUBERNETES_API', seen);
  return warning(
    'KUBERNETES_API',
    `${seen}; pods of ${others.map(({ what, count }) => `${what} (${count})`).join(', ')} are in the cluster`,
    'on nodes where they run see CILIUM, ISTIO and KMESH',
  );
}

async function policyFinding(api: Api, members: readonly Pod[] | undefined): Promise<Finding> {
  if (members === undefined) return notTried('NETWORK_POLICIES', 'no right to list pods and namespaces');
  const policies = await listed<NetworkPolicy>(api, '/apis/networking.k8s.io/v1/networkpolicies');
  if (policies === undefined) {
    return notTried(
      'NETWORK_POLICIES',
      `no right to list NetworkPolicies (${api.description})`,
      'give --kubeconfig of one who may; the agent has no such right on purpose',
    );
  }
  return judgePolicies(policies, members);
}

/** @param members pods of the mesh */
export function judgePolicies(policies: readonly NetworkPolicy[], members: readonly Pod[]): Finding {
  if (members.length === 0) return notTried('NETWORK_POLICIES', 'no pod of the cluster is in the mesh');
  const blocked = blockedPods(policies, members);
  const seen = `${policies.length} policies, ${members.length} pods of the mesh`;
  if (blocked.length === 0) return ok('NETWORK_POLICIES', seen);
  const all = blocked.filter(({ what }) => what === 'all');
  const list = some(
    (all.length > 0 ? all : blocked).map(
      ({ pod, direction, policies: by }) => `${direction} of ${pod} (${by.join(', ')})`,
    ),
  );
  const hint =
    'add TCP 15008 to the ports of the rules that are for pods of the mesh; the CNI sees no other port between them';
  const count = new Set(blocked.map(({ pod }) => pod)).size;
  return all.length > 0
    ? failed('NETWORK_POLICIES', `${seen}; ${count} pods without TCP 15008: ${list}`, hint)
    : warning('NETWORK_POLICIES', `${seen}; ${count} pods with TCP 15008 for some of their peers only: ${list}`, hint);
}

async function rootFinding(
  api: Api,
  members: readonly Pod[] | undefined,
  controllerRoots: string | undefined,
): Promise<Finding> {
  if (members === undefined) return notTried('CA_ROOT', 'no right to list pods and namespaces');
  const namespaces = [...new Set(members.map(namespaceOf))];
  if (namespaces.length === 0) return notTried('CA_ROOT', 'no pod of the cluster is in the mesh');
  const published = new Map<string, string | undefined>();
  const maps = await listed<{ metadata: { namespace?: string }; data?: Record<string, string> }>(
    api,
    '/api/v1/configmaps',
    { fieldSelector: `metadata.name=${ROOT_CONFIG_MAP}` },
  );
  if (maps === undefined) {
    return notTried(
      'CA_ROOT',
      `no right to read ConfigMap ${ROOT_CONFIG_MAP} (${api.description})`,
      'give --kubeconfig of one who may; the agent has no such right on purpose',
    );
  }
  for (const { metadata, data } of maps) published.set(metadata.namespace ?? '', data?.[ROOT_CONFIG_MAP_KEY]);
  return judgeRoots(namespaces, published, controllerRoots);
}

/** @param published PEM by namespace; @param controllerRoots PEM by which the controller was verified */
export function judgeRoots(
  namespaces: readonly string[],
  published: ReadonlyMap<string, string | undefined>,
  controllerRoots: string | undefined,
): Finding {
  const hint = 'the controller writes it: see its log for root_distribution, and its rights to ConfigMaps';
  const missing = namespaces.filter((namespace) => !published.get(namespace));
  if (missing.length > 0) return failed('CA_ROOT', `ConfigMap ${ROOT_CONFIG_MAP} is missing in ${some(missing)}`, hint);
  let sets: string[];
  try {
    sets = namespaces.map((namespace) => fingerprints(published.get(namespace) ?? ''));
  } catch (error) {
    return failed(
      'CA_ROOT',
      `ConfigMap ${ROOT_CONFIG_MAP} holds what is no certificate: ${(error as Error).message}`,
      hint,
    );
  }
  const different = namespaces.filter((_, index) => sets[index] !== sets[0]);
  if (different.length > 0) {
    return failed('CA_ROOT', `roots in ${some(different)} differ from those in ${namespaces[0]}`, hint);
  }
  const count = sets[0]?.split(' ').length ?? 0;
  const seen = `${count} roots, the same in ${namespaces.length} namespaces`;
  if (controllerRoots === undefined)
    return ok('CA_ROOT', `${seen}; not compared with the controller's, see CONTROLLER`);
  if (fingerprints(controllerRoots) !== sets[0]) {
    return failed(
      'CA_ROOT',
      `${seen}, but others than those by which the controller is trusted here (XDS_ROOT_CA)`,
      hint,
    );
  }
  return ok('CA_ROOT', `${seen}, and those by which the controller is trusted`);
}

const fingerprints = (pem: string): string =>
  splitPem(pem)
    .map((each) => new X509Certificate(each).fingerprint256)
    .sort()
    .join(' ');
