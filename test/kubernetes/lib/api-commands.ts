/** What every started API server has in common: command lines of etcd and kube-apiserver, and kubeconfigs. */
import { writeFileSync } from 'node:fs';

export interface EtcdOptions {
  /** Folder of its data. */
  readonly data: string;
  readonly clientUrl: string;
  readonly peerUrl: string;
}

/** etcd and its flags: one member that nothing but this machine's memory needs to outlive. */
export function etcdCommand({ data, clientUrl, peerUrl }: EtcdOptions): string[] {
  return [
    'etcd',
    ...['--name=only', `--data-dir=${data}`, '--unsafe-no-fsync', '--log-level=warn'],
    ...[`--listen-client-urls=${clientUrl}`, `--advertise-client-urls=${clientUrl}`],
    ...[
      `--listen-peer-urls=${peerUrl}`,
      `--initial-advertise-peer-urls=${peerUrl}`,
      `--initial-cluster=only=${peerUrl}`,
    ],
  ];
}

export interface ApiServerFlags {
  readonly etcdUrl: string;
  /** PEM files: the key by which service accounts' tokens are checked, and the one that signs them. */
  readonly tokenKeys: { readonly check: string; readonly sign: string };
  /** CSV of static users. */
  readonly users: string;
  readonly serviceRanges: string;
  readonly address: string;
  readonly port: number;
}

export function apiServerFlags({ etcdUrl, tokenKeys, users, serviceRanges, address, port }: ApiServerFlags): string[] {
  return [
    `--etcd-servers=${etcdUrl}`,
    '--service-account-issuer=https://kubernetes.default.svc',
    `--service-account-key-file=${tokenKeys.check}`,
    `--service-account-signing-key-file=${tokenKeys.sign}`,
    `--service-cluster-ip-range=${serviceRanges}`,
    '--authorization-mode=Node,RBAC',
    '--allow-privileged=true',
    `--token-auth-file=${users}`,
    `--bind-address=${address}`,
    `--secure-port=${port}`,
  ];
}

/** Writes a kubeconfig of one user, who has a token. @param ca PEM */
export function writeKubeconfig(path: string, { server, ca, token }: Record<'server' | 'ca' | 'token', string>): void {
  const config = {
    apiVersion: 'v1',
    kind: 'Config',
    clusters: [{ name: 'lab', cluster: { server, 'certificate-authority-data': Buffer.from(ca).toString('base64') } }],
    users: [{ name: 'user', user: { token } }],
    contexts: [{ name: 'lab', context: { cluster: 'lab', user: 'user' } }],
    'current-context': 'lab',
  };
  writeFileSync(path, JSON.stringify(config), { mode: 0o600 });
}
