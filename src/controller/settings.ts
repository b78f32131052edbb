/** What the controller can be told: every flag and environment name of `ebbtide controller` is read here, with its default. */
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { hostname } from 'node:os';
import { join } from 'node:path';
import type { Command } from 'commander';
import { type ApiOptions, SERVICE_ACCOUNT_DIRECTORY } from '../mesh/api/index.js';
import { parseDuration } from '../mesh/duration.js';
import { DEFAULT_TRUST_DOMAIN } from '../mesh/identity.js';
import { ROOT_NAMESPACE } from '../mesh/labels.js';
import { CONTROLLER_PORT } from '../mesh/ports.js';

export interface ListenAddress {
  /** IPv4 or IPv6 address without brackets. */
  readonly host: string;
  /** 0 lets the kernel choose. */
  readonly port: number;
}

/** What is served, wherever it comes from. */
export interface ServeSettings {
  readonly listen: ListenAddress;
  /** Longest lifetime of a workload certificate, in seconds; also the default. */
  readonly ttlSeconds: number;
  readonly trustDomain: string;
  /** DNS domain of the cluster's Services. */
  readonly clusterDomain: string;
  /** First segment of workload uids, and `Workload.cluster_id`. */
  readonly clusterId: string;
  /** Further names for the server certificate. */
  readonly serverNames?: readonly string[];
}

/** A mesh without a cluster. */
export interface ManifestSettings extends ServeSettings {
  /** Folder of Kubernetes manifests, watched. */
  readonly manifests: string;
  /** Folder of the root key, the root certificates and the node tokens. */
  readonly data: string;
}

/** A mesh of a Kubernetes cluster. */
export interface ClusterSettings extends ServeSettings {
  readonly access: ApiOptions;
  /** The controller's own namespace: Secrets of the root, and the Lease. */
  readonly namespace: string;
  /** Of this replica, in the Lease. */
  readonly identity: string;
  /** `namespace/name` of the service accounts whose pods may have certificates of others on their node. */
  readonly trustedAccounts: ReadonlySet<string>;
}

export type ControllerSettings = ManifestSettings | ClusterSettings;

interface RawOptions {
  readonly manifests?: string;
  readonly data?: string;
  readonly kubeconfig?: string;
  readonly serviceAccount: string;
  readonly namespace?: string;
  readonly podName: string;
  readonly trustedAccounts?: string;
  readonly listen: string;
  readonly ttl: string;
  readonly trustDomain: string;
  readonly clusterDomain: string;
  readonly clusterId: string;
}

const env = (name: string, fallback: string): string => process.env[name] ?? fallback;

/** Declares the flags of `ebbtide controller`; {@link readSettings} reads them. */
export function addOptions(command: Command): Command {
  const optional = (flags: string, text: string, name: string): void => {
    command.option(flags, `${text} (env ${name})`, process.env[name]);
  };
  optional(
    '--manifests <dir>',
    'folder of Kubernetes manifests, watched for changes; without it the Kubernetes API is watched',
    'EBBTIDE_MANIFESTS',
  );
  optional('--data <dir>', 'with --manifests: folder of root key, root certificates and node tokens', 'EBBTIDE_DATA');
  optional('--kubeconfig <file>', 'access to the Kubernetes API; without it that of the pod', 'KUBECONFIG');
  optional('--namespace <name>', "namespace of the root's Secret and the Lease; the pod's own", 'POD_NAMESPACE');
  optional(
    '--trusted-accounts <list>',
    'service accounts of node proxies, as namespace/name,...; <own namespace>/ebbtide-proxy',
    'CA_TRUSTED_NODE_ACCOUNTS',
  );
  return command
    .option(
      '--service-account <dir>',
      "token, ca.crt and namespace of the pod's service account (env EBBTIDE_SERVICE_ACCOUNT)",
      env('EBBTIDE_SERVICE_ACCOUNT', SERVICE_ACCOUNT_DIRECTORY),
    )
    .option('--pod-name <name>', 'name of this replica (env POD_NAME)', env('POD_NAME', hostname()))
    .option(
      '--listen <addr:port>',
      'address of xDS and the certificate authority (env EBBTIDE_LISTEN)',
      env('EBBTIDE_LISTEN', `127.0.0.1:${CONTROLLER_PORT}`),
    )
    .option(
      '--ttl <duration>',
      'longest and default lifetime of workload certificates, such as 24h or 30s (env EBBTIDE_TTL)',
      env('EBBTIDE_TTL', '24h'),
    )
    .option(
      '--trust-domain <name>',
      'trust domain of identities (env EBBTIDE_TRUST_DOMAIN)',
      env('EBBTIDE_TRUST_DOMAIN', DEFAULT_TRUST_DOMAIN),
    )
    .option(
      '--cluster-domain <name>',
      'DNS domain of Services (env EBBTIDE_CLUSTER_DOMAIN)',
      env('EBBTIDE_CLUSTER_DOMAIN', 'cluster.local'),
    )
    .option(
      '--cluster-id <id>',
      'name of this cluster in workload uids (env EBBTIDE_CLUSTER_ID)',
      env('EBBTIDE_CLUSTER_ID', 'Kubernetes'),
    );
}

/**
 * Reads what {@link addOptions} declared.
 * @throws Error naming the flag and the value that cannot be used
 */
export function readSettings(options: RawOptions): ControllerSettings {
  const name = (flag: string, value: string): string => {
    if (!/^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$/.test(value)) {
      throw new Error(`--${flag} ${JSON.stringify(value)}: expected a name of letters, digits, dots and dashes`);
    }
    return value;
  };
  const serve: ServeSettings = {
    listen: parseListen(options.listen),
    ttlSeconds: parseTtl(options.ttl),
    trustDomain: name('trust-domain', options.trustDomain),
    clusterDomain: name('cluster-domain', options.clusterDomain),
    clusterId: name('cluster-id', options.clusterId),
  };
  if (options.manifests !== undefined) {
    if (options.data === undefined) throw new Error('--manifests needs --data: a folder for the root key and tokens');
    return { ...serve, manifests: options.manifests, data: options.data };
  }
  const namespace = name('namespace', options.namespace ?? ownNamespace(options.serviceAccount) ?? ROOT_NAMESPACE);
  const accounts = options.trustedAccounts ?? `${namespace}/ebbtide-proxy`;
  return {
    ...serve,
    access:
      options.kubeconfig === undefined
        ? { serviceAccountDirectory: options.serviceAccount }
        : { kubeconfig: options.kubeconfig },
    namespace,
    // Two processes may share a host name.
    identity: `${options.podName}_${randomBytes(4).toString('hex')}`,
    trustedAccounts: parseAccounts(accounts),
    serverNames: ['istiod', 'ebbtide-controller'].flatMap((service) => [
      `${service}.${namespace}`,
      `${service}.${namespace}.svc`,
      `${service}.${namespace}.svc.${serve.clusterDomain}`,
    ]),
  };
}

/** Where Kubernetes tells a pod its namespace. */
function ownNamespace(directory: string): string | undefined {
  try {
    return readFileSync(join(directory, 'namespace'), 'utf8').trim();
  } catch {
    return undefined;
  }
}

/** Parses `istio-system/ebbtide-proxy,istio-system/ztunnel`. */
export function parseAccounts(text: string): Set<string> {
  const accounts = text
    .split(',')
    .map((part) => part.trim())
    .filter((part) => part !== '');
  for (const account of accounts) {
    if (!/^[a-z0-9]([-a-z0-9]*[a-z0-9])?\/[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/.test(account)) {
      throw new Error(`--trusted-accounts ${JSON.stringify(text)}: expected NAMESPACE/NAME, separated by commas`);
    }
  }
  return new Set(accounts);
}

/** Parses `127.0.0.1:15012` or `[::1]:15012`. */
export function parseListen(text: string): ListenAddress {
  const match = /^(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):(\d{1,5})$/.exec(text);
  const host = match?.[1] ?? match?.[2] ?? '';
  const port = Number(match?.[3]);
  if (isIP(host) === 0 || !(port <= 65535)) {
    throw new Error(`--listen ${JSON.stringify(text)}: expected ADDRESS:PORT, such as 127.0.0.1:15012 or [::1]:15012`);
  }
  return { host, port };
}

/** Istio's MAX_WORKLOAD_CERT_TTL. */
const MAX_TTL_SECONDS = 90 * 86_400;

/** Parses the lifetime of certificates, whose dates have whole seconds. @returns seconds */
export function parseTtl(text: string): number {
  let seconds = Number.NaN;
  try {
    seconds = parseDuration(text) / 1000;
  } catch {
    // Told below, with what is expected here.
  }
  if (!(Number.isInteger(seconds) && seconds >= 1 && seconds <= MAX_TTL_SECONDS)) {
    throw new Error(
      `--ttl ${JSON.stringify(text)}: expected a duration of whole seconds from 1s to 90d, such as 24h, 30m or 30s`,
    );
  }
  return seconds;
}
