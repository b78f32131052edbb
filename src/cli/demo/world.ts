/** The demo's cast: namespaces, pods with real programs, Services. */
import { randomBytes } from 'node:crypto';
import { type Lab, type Pod, startNginx, startRedis, startSshd } from '../../lab/index.js';

type Address = { readonly v4: string; readonly v6: string };

/** Texts that travel only inside connections between captured pods. */
export interface Markers {
  readonly page: string;
  readonly path: string;
  readonly value: string;
}

export interface World {
  readonly lab: Lab;
  readonly markers: Markers;
  /** Namespace `shop`, in the mesh: two clients on node1, three servers on node2. */
  readonly browser: Pod;
  readonly worker: Pod;
  readonly web: Pod;
  readonly cache: Pod;
  readonly ssh: Pod;
  /** Namespace `outside`, not in the mesh. */
  readonly visitor: Pod;
  /** Namespace `vault`, in the mesh, to become STRICT. */
  readonly store: Pod;
  /** Namespace `late`, labelled only later: a client on node1, a server on node2. */
  readonly lateClient: Pod;
  readonly lateWeb: Pod;
  /** Process id of the late server's nginx. */
  readonly lateNginx: number;
  readonly webService: Address;
  readonly cacheService: Address;
}

/** Makes pods and Services and starts the programs, before there is any mesh. */
export async function makeWorld(lab: Lab): Promise<World> {
  lab.namespace('shop', { mesh: true });
  lab.namespace('outside', { mesh: false });
  lab.namespace('vault', { mesh: true });
  lab.namespace('late', { mesh: false });
  const browser = await lab.pod({ name: 'browser', namespace: 'shop', node: 1 });
  const worker = await lab.pod({ name: 'worker', namespace: 'shop', node: 1 });
  const web = await lab.pod({ name: 'web', namespace: 'shop', node: 2 });
  const cache = await lab.pod({ name: 'cache', namespace: 'shop', node: 2 });
  const ssh = await lab.pod({ name: 'ssh', namespace: 'shop', node: 2 });
  const visitor = await lab.pod({ name: 'visitor', namespace: 'outside', node: 1 });
  const store = await lab.pod({ name: 'store', namespace: 'vault', node: 2 });
  const lateClient = await lab.pod({ name: 'client', namespace: 'late', node: 1 });
  const lateWeb = await lab.pod({ name: 'web', namespace: 'late', node: 2 });
  const webService = await lab.service({
    name: 'web',
    namespace: 'shop',
    pods: [web],
    ports: [{ port: 80, targetPort: 80 }],
  });
  const cacheService = await lab.service({
    name: 'cache',
    namespace: 'shop',
    pods: [cache],
    ports: [{ port: 6379, targetPort: 6379 }],
  });
  const secret = () => `payload-${randomBytes(8).toString('hex')}`;
  const markers = { page: secret(), path: secret(), value: secret() };
  const [, , , , lateNginx] = await Promise.all([
    startNginx(web, markers.page),
    startRedis(cache),
    startSshd(ssh),
    startNginx(store, 'store'),
    startNginx(lateWeb, 'late'),
  ]);
  return {
    ...{
      lab,
      markers,
      browser,
      worker,
      web,
      cache,
      ssh,
      visitor,
      store,
      lateClient,
      lateWeb,
      webService,
      cacheService,
    },
    lateNginx: lateNginx.pid,
  };
}

/** Programs that the demo needs, and the Debian packages that have them. */
export const PROGRAMS = {
  ip: 'iproute2',
  ss: 'iproute2',
  nsenter: 'util-linux',
  nft: 'nftables',
  tcpdump: 'tcpdump',
  bpftool: 'bpftool',
  nginx: 'nginx-light',
  'redis-server': 'redis-server',
  'redis-cli': 'redis-tools',
  sshd: 'openssh-server',
  'ssh-keyscan': 'openssh-client',
  'ssh-keygen': 'openssh-client',
  curl: 'curl',
  bash: 'bash',
} as const;
