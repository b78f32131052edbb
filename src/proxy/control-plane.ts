/** Calls to the control plane: TLS with roots that are read anew for each connection, bearer token, keepalive. */
import { existsSync, readFileSync } from 'node:fs';
import { isIP, isIPv6 } from 'node:net';
import { checkServerIdentity } from 'node:tls';
import { type ChannelOptions, Client, credentials, Metadata } from '@grpc/grpc-js';
import type { ControlPlaneSettings } from './settings.js';

/** ztunnel's figures. No proxies, no lookups of service configuration, no hidden retries: reconnecting is ours. */
const CHANNEL_OPTIONS: ChannelOptions = {
  'grpc.keepalive_time_ms': 30_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.keepalive_permit_without_calls': 1,
  'grpc.max_receive_message_length': 200 << 20,
  'grpc.max_send_message_length': 200 << 20,
  'grpc.enable_http_proxy': 0,
  'grpc.enable_retries': 0,
  'grpc.service_config_disable_resolution': 1,
  'grpc.use_local_subchannel_pool': 1,
};

/** Sent as SNI where the control plane is given as an address. */
const SNI_OF_ADDRESSES = 'istiod.istio-system.svc';

const MAX_FILE_BYTES = 1 << 20;

function readSmall(path: string, what: string): string {
  try {
    const text = readFileSync(path, 'utf8');
    if (text.length > MAX_FILE_BYTES) throw new Error(`it holds more than ${MAX_FILE_BYTES} characters`);
    return text;
  } catch (error) {
    throw new Error(`cannot read ${what} from ${path}: ${(error as Error).message}`);
  }
}

/**
 * Reads a root source: a path, PEM text or `SYSTEM`.
 * @returns PEM text, or undefined for the system's own roots
 * @throws Error where the file cannot be read or holds no certificate
 */
export function readRoots(source: string): string | undefined {
  if (source === 'SYSTEM') return undefined;
  const text = source.includes('-----BEGIN') ? source : readSmall(source, 'the root certificate');
  if (!text.includes('-----BEGIN CERTIFICATE-----')) throw new Error(`no PEM certificate in ${source.slice(0, 200)}`);
  return text;
}

/**
 * Reads the bearer token. Anything with a slash or that exists as a file is a path, whose file may appear later.
 * @returns undefined where there is none
 */
export function readToken(source: string): string | undefined {
  if (source === '') return undefined;
  const isPath = source.includes('/') || existsSync(source);
  if (!isPath) return source.trim();
  const token = readSmall(source, 'the bearer token').trim();
  if (token === '') throw new Error(`the bearer token in ${source} is empty`);
  return token;
}

/** Metadata of one call. The token is read now. */
export function callMetadata(settings: ControlPlaneSettings): Metadata {
  const metadata = new Metadata();
  const token = readToken(settings.authToken);
  if (token !== undefined) metadata.set('authorization', `Bearer ${token}`);
  metadata.set('clusterid', settings.clusterId);
  for (const [name, value] of settings.headers) metadata.set(name, value);
  return metadata;
}

/**
 * Opens a channel of its own; it connects at the first call.
 * @param roots what {@link readRoots} gave
 */
export function openChannel(settings: ControlPlaneSettings, roots: string | undefined): Client {
  const { host, port, altHostname } = settings;
  const tls = credentials.createSsl(roots === undefined ? null : Buffer.from(roots), null, null, {
    // By the name that was configured, whatever was sent as SNI.
    checkServerIdentity: (_, certificate) => {
      const problem = checkServerIdentity(host, certificate);
      if (problem === undefined || altHostname === '') return problem;
      return checkServerIdentity(altHostname, certificate) === undefined ? undefined : problem;
    },
  });
  return new Client(isIPv6(host) ? `ipv6:[${host}]:${port}` : `dns:${host}:${port}`, tls, {
    ...CHANNEL_OPTIONS,
    // An address must not be sent as SNI (RFC 6066).
    ...(isIP(host) === 0 ? {} : { 'grpc.ssl_target_name_override': SNI_OF_ADDRESSES }),
  });
}
