/** Objects that the cluster tests apply. */
import { DATAPLANE_MODE_AMBIENT, DATAPLANE_MODE_LABEL } from '../../../src/mesh/labels.ts';
import { TOOLS_IMAGE } from './images.ts';

/** Ports of test/lib/programs/server.py, by behaviour. */
export const WHOAMI_PORT = 9000;
export const ECHO_PORT = 9001;

export function namespaceObject(name: string, mesh: boolean): object {
  const labels = mesh ? { [DATAPLANE_MODE_LABEL]: DATAPLANE_MODE_AMBIENT } : {};
  return { apiVersion: 'v1', kind: 'Namespace', metadata: { name, labels } };
}

export function serviceAccountObject(namespace: string, name: string): object {
  return { apiVersion: 'v1', kind: 'ServiceAccount', metadata: { namespace, name } };
}

export function serviceObject(namespace: string, name: string): object {
  const ports = [WHOAMI_PORT, ECHO_PORT].map((port) => ({ name: `tcp-${port}`, port }));
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { namespace, name },
    spec: { selector: { app: name }, ports },
  };
}

export interface ServerOptions {
  readonly namespace: string;
  readonly name: string;
  readonly replicas?: number;
  readonly node?: string;
  readonly probe?: object;
  readonly serviceAccount?: string;
  /** Instead of the tests' server. */
  readonly command?: readonly string[];
}

/** A Deployment of the tests' server; pods that are to end are given a moment in which they still serve. */
export function serverDeployment(options: ServerOptions): object {
  const { namespace, name, replicas = 1, node, serviceAccount = 'default' } = options;
  const probe = options.probe ?? { tcpSocket: { port: WHOAMI_PORT } };
  return {
    apiVersion: 'apps/v1',
    kind: 'Deployment',
    metadata: { namespace, name },
    spec: {
      replicas,
      selector: { matchLabels: { app: name } },
      strategy: { type: 'RollingUpdate', rollingUpdate: { maxSurge: 1, maxUnavailable: 0 } },
      template: {
        metadata: { labels: { app: name } },
        spec: {
          ...(node === undefined ? {} : { nodeName: node }),
          serviceAccountName: serviceAccount,
          terminationGracePeriodSeconds: 10,
          containers: [
            {
              name: 'server',
              image: TOOLS_IMAGE,
              imagePullPolicy: 'Never',
              command: options.command ?? ['python3', '/programs/server.py'],
              readinessProbe: { ...probe, periodSeconds: 1, failureThreshold: 2 },
              lifecycle: { preStop: { exec: { command: ['sleep', '3'] } } },
            },
          ],
        },
      },
    },
  };
}

/** A pod of the tools image that waits to be told what to run. */
export function toolsPod(namespace: string, name: string, node: string, serviceAccount = 'default'): object {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { namespace, name, labels: { app: name } },
    spec: {
      nodeName: node,
      serviceAccountName: serviceAccount,
      terminationGracePeriodSeconds: 1,
      containers: [{ name: 'tools', image: TOOLS_IMAGE, imagePullPolicy: 'Never', command: ['sleep', 'infinity'] }],
    },
  };
}

/** Mode of all pods of a namespace. */
export function peerAuthenticationObject(namespace: string, mode: 'STRICT' | 'PERMISSIVE'): object {
  return {
    apiVersion: 'security.istio.io/v1',
    kind: 'PeerAuthentication',
    metadata: { namespace, name: 'default' },
    spec: { mtls: { mode } },
  };
}

/** Refuses one service account everything in a namespace. */
export function denyObject(namespace: string, name: string, principal: string): object {
  return {
    apiVersion: 'security.istio.io/v1',
    kind: 'AuthorizationPolicy',
    metadata: { namespace, name },
    spec: { action: 'DENY', rules: [{ from: [{ source: { principals: [principal] } }] }] },
  };
}
