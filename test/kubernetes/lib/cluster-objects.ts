/** Objects of a cluster without controllers and kubelets: what those would make is made by hand, over the real API. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { ApiServer } from './api-server.js';

const KINDS = [
  ['security.istio.io', 'AuthorizationPolicy', 'authorizationpolicies'],
  ['security.istio.io', 'PeerAuthentication', 'peerauthentications'],
  ['networking.istio.io', 'ServiceEntry', 'serviceentries'],
  ['networking.istio.io', 'WorkloadEntry', 'workloadentries'],
] as const;

/** Installs definitions of Istio's kinds without their schemas, and waits until they are served. */
export async function installDefinitions(server: ApiServer): Promise<void> {
  for (const [group, kind, plural] of KINDS) {
    await server.api.request('POST', '/apis/apiextensions.k8s.io/v1/customresourcedefinitions', {
      body: {
        metadata: { name: `${plural}.${group}` },
        spec: {
          group,
          scope: 'Namespaced',
          names: { kind, listKind: `${kind}List`, plural, singular: kind.toLowerCase() },
          versions: [
            {
              name: 'v1',
              served: true,
              storage: true,
              subresources: { status: {} },
              schema: {
                openAPIV3Schema: {
                  type: 'object',
                  properties: {
                    spec: { type: 'object', 'x-kubernetes-preserve-unknown-fields': true },
                    status: { type: 'object', 'x-kubernetes-preserve-unknown-fields': true },
                  },
                },
              },
            },
          ],
        },
      },
    });
  }
  for (const [group, , plural] of KINDS) {
    for (let tries = 0; ; tries++) {
      try {
        await server.api.request('GET', `/apis/${group}/v1/${plural}`);
        break;
      } catch (error) {
        if (tries > 200) throw error;
        await sleep(100);
      }
    }
  }
}

/** Path of a custom resource. */
export function pathOf(kind: (typeof KINDS)[number][1], namespace: string, name?: string): string {
  const found = KINDS.find(([, candidate]) => candidate === kind);
  const [group, , plural] = found ?? KINDS[0];
  return `/apis/${group}/v1/namespaces/${namespace}/${plural}${name === undefined ? '' : `/${name}`}`;
}

/** Creates or replaces a custom resource. */
export async function putCustom(
  server: ApiServer,
  kind: (typeof KINDS)[number][1],
  namespace: string,
  name: string,
  spec: object,
): Promise<void> {
  const group = kind === 'ServiceEntry' || kind === 'WorkloadEntry' ? 'networking.istio.io' : 'security.istio.io';
  await server.api.request('PATCH', pathOf(kind, namespace, name), {
    query: { fieldManager: 'test', force: true },
    contentType: 'application/apply-patch+yaml',
    body: { apiVersion: `${group}/v1`, kind, metadata: { name, namespace }, spec },
  });
}

/** A namespace with a service account `default`, which the controller manager would make. */
export async function makeNamespace(
  server: ApiServer,
  name: string,
  labels: Readonly<Record<string, string>> = {},
): Promise<void> {
  await server.api.request('POST', '/api/v1/namespaces', { body: { metadata: { name, labels } } });
  await makeServiceAccount(server, name, 'default');
}

export async function makeServiceAccount(server: ApiServer, namespace: string, name: string): Promise<void> {
  await server.api.request('POST', `/api/v1/namespaces/${namespace}/serviceaccounts`, { body: { metadata: { name } } });
}

export async function makeNode(
  server: ApiServer,
  name: string,
  labels: Readonly<Record<string, string>> = {},
): Promise<void> {
  await server.api.request('POST', '/api/v1/nodes', { body: { metadata: { name, labels } } });
}

export interface PodOptions {
  readonly node: string;
  readonly ip?: string;
  readonly serviceAccount?: string;
  readonly labels?: Readonly<Record<string, string>>;
  readonly annotations?: Readonly<Record<string, string>>;
}

export interface MadePod {
  readonly name: string;
  readonly uid: string;
}

/** A pod that runs, as scheduler and kubelet would say. */
export async function makePod(
  server: ApiServer,
  namespace: string,
  name: string,
  { node, ip, serviceAccount = 'default', labels = {}, annotations = {} }: PodOptions,
): Promise<MadePod> {
  const path = `/api/v1/namespaces/${namespace}/pods`;
  const pod = await server.api.request<{ metadata: { uid: string } }>('POST', path, {
    body: {
      metadata: { name, labels, annotations },
      spec: {
        nodeName: node,
        serviceAccountName: serviceAccount,
        // The API server would wait for the kubelet to end the pod.
        terminationGracePeriodSeconds: 0,
        containers: [{ name: 'main', image: 'none', ports: [{ name: 'web', containerPort: 8080 }] }],
      },
    },
  });
  await setPodStatus(server, namespace, name, {
    phase: 'Running',
    conditions: [{ type: 'Ready', status: 'True' }],
    ...(ip === undefined ? {} : { podIP: ip, podIPs: [{ ip }] }),
  });
  return { name, uid: pod.metadata.uid };
}

export async function setPodStatus(server: ApiServer, namespace: string, name: string, status: object): Promise<void> {
  await server.api.request('PATCH', `/api/v1/namespaces/${namespace}/pods/${name}/status`, { body: { status } });
}

export async function deletePod(server: ApiServer, namespace: string, name: string): Promise<void> {
  const path = `/api/v1/namespaces/${namespace}/pods/${name}`;
  await server.api.request('DELETE', path, { query: { gracePeriodSeconds: 0 } });
}

/**
 * Creates what the chart grants the controller, and its service account. @returns its namespace
 * @param rendered the chart's objects
 */
export async function grantRights(
  server: ApiServer,
  rendered: readonly {
    readonly apiVersion: string;
    readonly kind: string;
    readonly metadata: { readonly name: string; readonly namespace?: string };
  }[],
): Promise<void> {
  const paths: Readonly<Record<string, string>> = {
    ClusterRole: 'clusterroles',
    ClusterRoleBinding: 'clusterrolebindings',
    Role: 'roles',
    RoleBinding: 'rolebindings',
  };
  for (const object of rendered) {
    const plural = paths[object.kind];
    if (plural === undefined) continue;
    const within = object.metadata.namespace === undefined ? '' : `/namespaces/${object.metadata.namespace}`;
    await server.api.request('POST', `/apis/rbac.authorization.k8s.io/v1${within}/${plural}`, { body: object });
  }
}
