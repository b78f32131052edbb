/** The yardstick: Debian's HAProxy on each node as a mutual TLS 1.3 tunnel, AES-128-GCM. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Lab, type LabProcess, lab } from '../lib/lab.ts';

const CLIENT_NODE = '172.30.0.1';
const SERVER_NODE = '172.30.0.2';
const TUNNEL_OFFSET = 20000;

/**
 * Starts one HAProxy on each node, which carry these ports to the same ports of the server pod.
 * @returns address to connect to from a pod of node 1, and the two processes
 */
export async function startHaproxy(
  within: Lab,
  server: string,
  ports: readonly number[],
): Promise<{ address: string; processes: LabProcess[] }> {
  const directory = join(within.ground.directory, 'haproxy');
  mkdirSync(directory);
  await certificates(directory);
  const processes: LabProcess[] = [];
  for (const node of [1, 2] as const) {
    const file = join(directory, `node${node}.cfg`);
    writeFileSync(file, node === 1 ? clientSide(directory, ports) : serverSide(directory, ports, server));
    const place = { netns: within.ground.netnsPath(`node${node}`), cgroup: within.ground.subgroup('haproxy') };
    const log = join(within.ground.directory, 'logs', `haproxy-node${node}.log`);
    processes.push(
      await lab.LabProcess.start(`haproxy of node${node}`, place, ['haproxy', '-db', '-f', file], { log }),
    );
  }
  return { address: CLIENT_NODE, processes };
}

async function certificates(directory: string): Promise<void> {
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  const authority = [join(directory, 'ca.pem'), join(directory, 'ca.key')] as const;
  await lab.must([
    ...['openssl', 'req', '-x509', ...key, '-subj', '/CN=bench'],
    ...['-out', authority[0], '-keyout', authority[1]],
  ]);
  for (const name of ['client', 'server']) {
    const [certificate, privateKey] = [join(directory, `${name}.crt`), join(directory, `${name}.key`)];
    await lab.must([
      ...['openssl', 'req', '-x509', ...key, '-subj', `/CN=${name}`, '-CA', authority[0], '-CAkey', authority[1]],
      ...['-out', certificate, '-keyout', privateKey],
    ]);
    writeFileSync(join(directory, `${name}.pem`), readFileSync(certificate, 'utf8') + readFileSync(privateKey, 'utf8'));
  }
}

const COMMON = `global
  nbthread 2
  maxconn 8000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-options ssl-min-ver TLSv1.3
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
`;

function clientSide(directory: string, ports: readonly number[]): string {
  const tls = `ssl crt ${directory}/client.pem ca-file ${directory}/ca.pem verify required`;
  const section = (port: number) => `listen port${port}
  bind ${CLIENT_NODE}:${port}
  server node2 ${SERVER_NODE}:${port + TUNNEL_OFFSET} ${tls}
`;
  return COMMON + ports.map(section).join('');
}

function serverSide(directory: string, ports: readonly number[], server: string): string {
  const tls = `ssl crt ${directory}/server.pem ca-file ${directory}/ca.pem verify required`;
  const section = (port: number) => `listen port${port}
  bind ${SERVER_NODE}:${port + TUNNEL_OFFSET} ${tls}
  server pod ${server}:${port}
`;
  return COMMON + ports.map(section).join('');
}
