/** What the controller can be told: every flag and environment name of `ebbtide controller` is read here, with its default. */
import { isIP } from 'node:net';
import type { Command } from 'commander';
import { DEFAULT_TRUST_DOMAIN } from '../mesh/identity.js';
import { CONTROLLER_PORT } from '../mesh/ports.js';

export interface ListenAddress {
  /** IPv4 or IPv6 address without brackets. */
  readonly host: string;
  /** 0 lets the kernel choose. */
  readonly port: number;
}

export interface ControllerSettings {
  /** Folder of Kubernetes manifests, watched. */
  readonly manifests: string;
  /** Folder of the root key, the root certificates and the node tokens. */
  readonly data: string;
  readonly listen: ListenAddress;
  /** Longest lifetime of a workload certificate, in seconds; also the default. */
  readonly ttlSeconds: number;
  readonly trustDomain: string;
  /** DNS domain of the cluster's Services. */
  readonly clusterDomain: string;
  /** First segment of workload uids, and `Workload.cluster_id`. */
  readonly clusterId: string;
}

interface RawOptions {
  readonly manifests: string;
  readonly data: string;
  readonly listen: string;
  readonly ttl: string;
  readonly trustDomain: string;
  readonly clusterDomain: string;
  readonly clusterId: string;
}

const env = (name: string, fallback: string): string => process.env[name] ?? fallback;

/** Declares the flags of `ebbtide controller`; {@link readSettings} reads them. */
export function addOptions(command: Command): Command {
  const required = (flags: string, text: string, name: string): void => {
    const value = process.env[name];
    if (value === undefined) command.requiredOption(flags, `${text} (env ${name})`);
    else command.option(flags, `${text} (env ${name})`, value);
  };
  required('--manifests <dir>', 'folder of Kubernetes manifests, watched for changes', 'EBBTIDE_MANIFESTS');
  required('--data <dir>', 'folder of the root key, root certificates and node tokens', 'EBBTIDE_DATA');
  return command
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
  return {
    manifests: options.manifests,
    data: options.data,
    listen: parseListen(options.listen),
    ttlSeconds: parseDuration('ttl', options.ttl),
    trustDomain: name('trust-domain', options.trustDomain),
    clusterDomain: name('cluster-domain', options.clusterDomain),
    clusterId: name('cluster-id', options.clusterId),
  };
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

const SECONDS: Readonly<Record<string, number>> = { s: 1, m: 60, h: 3600, d: 86_400 };
/** Istio's MAX_WORKLOAD_CERT_TTL. */
const MAX_TTL_SECONDS = 90 * 86_400;

/** Parses `30s`, `10m`, `24h`, `1d` to seconds. */
export function parseDuration(flag: string, text: string): number {
  const match = /^(\d+)([smhd])$/.exec(text);
  const seconds = Number(match?.[1]) * (SECONDS[match?.[2] ?? ''] ?? Number.NaN);
  if (!(seconds >= 1 && seconds <= MAX_TTL_SECONDS)) {
    throw new Error(`--${flag} ${JSON.stringify(text)}: expected a duration from 1s to 90d, such as 24h, 30m or 30s`);
  }
  return seconds;
}
