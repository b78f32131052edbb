/** Where the API server is and how to be let in: a pod's service account, or a kubeconfig. */
import { readFileSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { join } from 'node:path';

/** Where Kubernetes mounts a pod's service account: `token`, `ca.crt`, `namespace`. */
export const SERVICE_ACCOUNT_DIRECTORY = '/var/run/secrets/kubernetes.io/serviceaccount';

/** What one request needs to reach the server; asked for anew before each, because tokens and certificates rotate. */
export interface Access {
  /** `https://host:port`, without a path's end. */
  readonly server: string;
  readonly headers: Readonly<Record<string, string>>;
  /** PEM. */
  readonly ca?: string | Buffer;
  readonly cert?: string | Buffer;
  readonly key?: string | Buffer;
  readonly servername?: string;
  readonly rejectUnauthorized?: boolean;
  /** Set where the kubeconfig names a proxy. */
  readonly agent?: import('node:http').Agent;
}

export interface AccessSource {
  /** @throws Error where files cannot be read or a credential helper fails */
  access(): Promise<Access>;
  /** The server refused the credentials (401): what was remembered of them is of no use. */
  refused(): void;
  /** Namespace that this process runs in or that the kubeconfig's context names, where one does. */
  namespace(): string | undefined;
  /** For messages. */
  readonly description: string;
}

/**
 * A pod's own access. Token and CA are files that the kubelet replaces; they are read before each request, which is
 * cheap beside the request and needs no guess of when they change.
 * @param server overrides what Kubernetes puts into the environment
 * @throws Error where this is no pod
 */
export function serviceAccountAccess(directory: string, server: string | undefined): AccessSource {
  const url = server ?? serverOfEnvironment();
  const read = (name: string): string => {
    const path = join(directory, name);
    try {
      return readFileSync(path, 'utf8').trim();
    } catch (error) {
      throw new Error(`cannot read ${path}, a pod's access to the Kubernetes API: ${(error as Error).message}`);
    }
  };
  return {
    description: `service account of ${directory}`,
    async access() {
      const headers = { Authorization: `Bearer ${read('token')}` };
      return url.startsWith('https:') ? { server: url, headers, ca: read('ca.crt') } : { server: url, headers };
    },
    refused() {},
    namespace() {
      try {
        return read('namespace');
      } catch {
        return undefined;
      }
    },
  };
}

function serverOfEnvironment(): string {
  const host = process.env['KUBERNETES_SERVICE_HOST'];
  const port = process.env['KUBERNETES_SERVICE_PORT'];
  if (host === undefined || port === undefined) {
    throw new Error(
      'no Kubernetes API: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this is no pod; ' +
        'outside of a cluster give --kubeconfig FILE, or without one --manifests DIR',
    );
  }
  return `https://${isIPv6(host) ? `[${host}]` : host}:${port}`;
}

/**
 * Access by a kubeconfig: client certificates, tokens, credential helpers, proxies, as kubectl has them. The library that
 * knows all of that costs some 85 MB of memory, so it is loaded only here, where no pod of a cluster comes by.
 */
export function kubeconfigAccess(path: string): AccessSource {
  type Config = import('@kubernetes/client-node/dist/config.js').KubeConfig;
  let loading: Promise<Config> | undefined;
  let loaded: Config | undefined;
  const load = async (): Promise<Config> => {
    const { KubeConfig } = await import('@kubernetes/client-node/dist/config.js');
    const config = new KubeConfig();
    try {
      config.loadFromFile(path);
    } catch (error) {
      throw new Error(`cannot read the kubeconfig ${path}: ${(error as Error).message}`);
    }
    if (!config.getCurrentCluster()) throw new Error(`the kubeconfig ${path} has no current context with a cluster`);
    loaded = config;
    return config;
  };
  return {
    description: `kubeconfig ${path}`,
    async access() {
      loading ??= load();
      let config: Config;
      try {
        config = await loading;
      } catch (error) {
        loading = undefined;
        throw error;
      }
      const options: import('node:https').RequestOptions = {};
      await config.applyToHTTPSOptions(options);
      const cluster = config.getCurrentCluster();
      const access: { -readonly [K in keyof Access]: Access[K] } = {
        server: String(cluster?.server).replace(/\/+$/, ''),
        headers: { ...(options.headers as Record<string, string>) },
      };
      if (options.auth) access.headers = { ...access.headers, Authorization: basic(options.auth) };
      if (options.ca) access.ca = options.ca as Buffer;
      if (options.cert) access.cert = options.cert as Buffer;
      if (options.key) access.key = options.key as Buffer;
      if (options.servername) access.servername = options.servername;
      if (options.rejectUnauthorized !== undefined) access.rejectUnauthorized = options.rejectUnauthorized;
      // Without a proxy our own connections are used, which a silent server cannot hold up.
      if (cluster?.proxyUrl && options.agent) access.agent = options.agent as import('node:http').Agent;
      return access;
    },
    refused() {
      loading = undefined;
    },
    namespace: () => loaded?.getContextObject(loaded.getCurrentContext())?.namespace,
  };
}

const basic = (userAndPassword: string): string => `Basic ${Buffer.from(userAndPassword).toString('base64')}`;
