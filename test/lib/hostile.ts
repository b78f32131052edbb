/** Programs of root in a pod: connections made in every way, hand-made packets, and what it can see of the mesh in there. */
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Lab, must, type Pod, waitFor } from '../../src/lab/index.ts';
import { buildPeerCommand } from '../datapath/capture/build-peer.ts';
import { Peer } from '../datapath/capture/lab.ts';

const RAW = fileURLToPath(new URL('programs/raw.py', import.meta.url));

/** Port from which hand-made packets come. */
export const RAW_PORT = 40001;

/** Builds the program that connects and serves in every way; @returns its path. */
export async function buildPeer(lab: Lab): Promise<string> {
  const program = join(lab.ground.directory, 'peer');
  await must(buildPeerCommand(program));
  return program;
}

/** What the program's `connect` came to. */
export interface Connected {
  readonly ok: boolean;
  readonly step?: string;
  readonly errno?: number;
  readonly local?: string;
  readonly peer?: string;
  readonly answer?: string;
}

/** Connects from a pod; options as in peer.c. */
export async function connectFrom(
  peer: string,
  pod: Pod,
  address: string,
  port: number,
  ...options: readonly string[]
): Promise<Connected> {
  const done = await pod.run([peer, 'connect', address, `${port}`, ...options]);
  const last = done.stdout.trim().split('\n').at(-1);
  if (!last) throw new Error(`connect from ${pod.id} said nothing (${done.code}): ${done.stderr}`);
  return JSON.parse(last) as Connected;
}

/** A server in a pod that says "app CLIENT"; its `lines` are what it saw. */
export async function serveIn(peer: string, pod: Pod, address: string, port: number, reusePort = false): Promise<Peer> {
  const argv = ['nsenter', `--net=${pod.place.netns}`, peer, 'serve', address, `${port}`];
  const server = new Peer(reusePort ? [...argv, 'reuseport'] : argv);
  await server.next((line) => line.ready === true || 'step' in line);
  return server;
}

/** Sends hand-made packets from a pod. @returns how many the pod's kernel took */
export async function sendRaw(
  lab: Lab,
  pod: Pod,
  kind: string,
  to: string,
  port: number,
  text: string,
): Promise<number> {
  const from = to.includes(':') ? pod.addresses.v6 : pod.addresses.v4;
  const mac = await gatewayMac(lab, pod);
  const done = await pod.run(['python3', RAW, kind, from, to, `${port}`, mac, text]);
  if (done.code !== 0) throw new Error(`${kind} from ${pod.id}: ${done.stderr.trim().split('\n').at(-1)}`);
  return Number(done.stdout);
}

/** Address of the node's end of a pod's veth. */
async function gatewayMac(lab: Lab, pod: Pod): Promise<string> {
  const route = ['-j', 'route', 'get', pod.addresses.v4];
  const node = ['nsenter', `--net=${lab.node(pod.node).place.netns}`, 'ip'];
  const [{ dev }] = JSON.parse(await must([...node, ...route])) as [{ dev: string }];
  const [{ address }] = JSON.parse(await must([...node, '-j', 'link', 'show', dev])) as [{ address: string }];
  return address;
}

/** Ports that the kernel chose for the proxy's listeners in a pod, as anybody in there sees them. */
export async function proxyListeners(pod: Pod, proxyPid: number): Promise<number[]> {
  const ports = await waitFor(`listeners of the proxy in ${pod.id}`, async () => {
    const { stdout } = await pod.run(['ss', '-HltnpO']);
    const own = stdout.split('\n').filter((line) => line.includes(`pid=${proxyPid},`));
    return own.length > 0 && own.map((line) => Number(/:(\d+)\s/.exec(line)?.[1]));
  });
  return [...new Set(ports)];
}
