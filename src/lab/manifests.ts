/** Kubernetes objects of a lab as YAML files in a folder, which controller and agents read and watch. */
import { existsSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { DATAPLANE_MODE_AMBIENT, DATAPLANE_MODE_LABEL, NETNS_ANNOTATION } from '../mesh/labels.js';
import type { Addresses } from './network.js';

/** A Kubernetes object, as much as a lab writes of it. */
export interface Manifest {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: { readonly name: string; readonly namespace?: string; readonly [key: string]: unknown };
  readonly [key: string]: unknown;
}

/** A folder of manifests, one object a file; a file appears whole or not at all. */
export class ManifestFolder {
  readonly directory: string;
  readonly #staging: string;

  /** @param staging directory of the same file system that nobody watches */
  constructor(directory: string, staging: string) {
    this.directory = directory;
    this.#staging = staging;
  }

  /** The file of an object. */
  file(manifest: Manifest): string {
    const { name, namespace } = manifest.metadata;
    const parts = [manifest.kind.toLowerCase(), ...(namespace === undefined ? [] : [namespace]), name];
    return join(this.directory, `${parts.join('-')}.yaml`);
  }

  write(...manifests: readonly Manifest[]): void {
    for (const manifest of manifests) {
      const staged = join(this.#staging, 'manifest.yaml');
      writeFileSync(staged, stringify(manifest));
      renameSync(staged, this.file(manifest));
    }
  }

  remove(...manifests: readonly Manifest[]): void {
    for (const manifest of manifests) {
      if (existsSync(this.file(manifest))) rmSync(this.file(manifest));
    }
  }
}

/** @param mesh whether the namespace's pods belong in the mesh */
export function namespaceManifest(name: string, mesh: boolean): Manifest {
  const labels = mesh ? { [DATAPLANE_MODE_LABEL]: DATAPLANE_MODE_AMBIENT } : {};
  return { apiVersion: 'v1', kind: 'Namespace', metadata: { name, labels } };
}

export function nodeManifest(name: string, addresses: Addresses): Manifest {
  return {
    apiVersion: 'v1',
    kind: 'Node',
    metadata: { name },
    status: {
      addresses: [
        { type: 'InternalIP', address: addresses.v4 },
        { type: 'InternalIP', address: addresses.v6 },
        { type: 'Hostname', address: name },
      ],
    },
  };
}

export interface PodDescription {
  readonly name: string;
  readonly namespace: string;
  readonly uid: string;
  readonly serviceAccount: string;
  readonly node: string;
  readonly addresses: Addresses;
  readonly nodeAddresses: Addresses;
  readonly netns: string;
  readonly labels: Readonly<Record<string, string>>;
}

export function podManifest(pod: PodDescription): Manifest {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: {
      name: pod.name,
      namespace: pod.namespace,
      uid: pod.uid,
      labels: pod.labels,
      annotations: { [NETNS_ANNOTATION]: pod.netns },
    },
    spec: {
      nodeName: pod.node,
      serviceAccountName: pod.serviceAccount,
      containers: [{ name: 'main', image: 'local' }],
    },
    status: {
      phase: 'Running',
      podIP: pod.addresses.v4,
      podIPs: [{ ip: pod.addresses.v4 }, { ip: pod.addresses.v6 }],
      hostIP: pod.nodeAddresses.v4,
      conditions: [{ type: 'Ready', status: 'True' }],
    },
  };
}

export interface ServiceDescription {
  readonly name: string;
  readonly namespace: string;
  /** Empty: headless. */
  readonly addresses: readonly string[];
  readonly selector: Readonly<Record<string, string>>;
  readonly ports: readonly { readonly port: number; readonly targetPort: number }[];
}

export function serviceManifest(service: ServiceDescription): Manifest {
  const clusterIPs = service.addresses.length === 0 ? ['None'] : service.addresses;
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { name: service.name, namespace: service.namespace },
    spec: {
      clusterIP: clusterIPs[0],
      clusterIPs,
      selector: service.selector,
      ports: service.ports.map(({ port, targetPort }) => ({ name: `tcp-${port}`, protocol: 'TCP', port, targetPort })),
    },
  };
}

/** @param spec the policy's spec as Istio's API has it: selector, action, rules */
export function authorizationPolicy(
  name: string,
  namespace: string,
  spec: Readonly<Record<string, unknown>>,
): Manifest {
  return { apiVersion: 'security.istio.io/v1', kind: 'AuthorizationPolicy', metadata: { name, namespace }, spec };
}

/** @param mode STRICT, PERMISSIVE, DISABLE or UNSET */
export function peerAuthentication(name: string, namespace: string, mode: string): Manifest {
  return {
    apiVersion: 'security.istio.io/v1',
    kind: 'PeerAuthentication',
    metadata: { name, namespace },
    spec: { mtls: { mode } },
  };
}
