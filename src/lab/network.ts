/** Addresses and links of a lab: two nodes joined by a wire, a control network beside it, routed pods on each node. */
import { basename } from 'node:path';
import { must } from './exec.js';
import type { Ground } from './ground.js';

/** Interface of the wire between the nodes, in each node. Only traffic of pods is on it. */
export const WIRE = 'wire0';
/** Address of the controller on the control network. */
export const CONTROL_ADDRESS = '172.31.255.100';
/** Ranges from which Services of a lab have their addresses. */
export const SERVICE_PREFIX = { v4: '10.96.0.', v6: 'fd00:96::' } as const;
const GATEWAY_V4 = '169.254.1.1';
const GATEWAY_V6 = 'fe80::1';

export interface Addresses {
  readonly v4: string;
  readonly v6: string;
}

/** Addresses of node 1 or 2 on the wire. */
export function nodeAddresses(node: number): Addresses {
  return { v4: `172.30.0.${node}`, v6: `fd00:30::${node}` };
}

/** Addresses of the nth pod of a node. */
export function podAddresses(node: number, n: number): Addresses {
  return { v4: `10.244.${node}.${10 + n}`, v6: `fd00:244:${node}::${(16 + n).toString(16)}` };
}

async function batch(netns: string, commands: readonly string[]): Promise<void> {
  await must(['nsenter', `--net=${netns}`, 'ip', '-batch', '-'], { input: `${commands.join('\n')}\n` });
}

/** Lines of `ip -batch` for a node's end of the wire: its addresses, and the way to the other node's pods. */
export function wireEnd(node: number, device: string): string[] {
  const other = 3 - node;
  const own = nodeAddresses(node);
  const peer = nodeAddresses(other);
  return [
    `addr add ${own.v4}/24 dev ${device}`,
    `addr add ${own.v6}/64 dev ${device} nodad`,
    `link set ${device} up`,
    `route add 10.244.${other}.0/24 via ${peer.v4}`,
    `route add fd00:244:${other}::/64 via ${peer.v6} dev ${device}`,
  ];
}

/** Two nodes and the control network. Nothing is made in the machine's own network namespace. */
export async function makeNodes(ground: Ground): Promise<void> {
  for (const name of ['control', 'node1', 'node2']) {
    await must(['sh', '-c', netnsScript(ground.netnsPath(name), true)]);
  }
  const control = ground.netnsName('control');
  await batch(ground.netnsPath('control'), [
    'link set lo up',
    'link add control0 type bridge',
    `addr add ${CONTROL_ADDRESS}/24 dev control0`,
    'link set control0 up',
  ]);
  await batch(ground.netnsPath('node1'), [
    `link add ${WIRE} type veth peer name ${WIRE} netns ${ground.netnsName('node2')}`,
  ]);
  for (const node of [1, 2]) {
    await batch(ground.netnsPath(`node${node}`), [
      'link set lo up',
      `link add control0 type veth peer name node${node} netns ${control}`,
      `addr add 172.31.255.${node}/24 dev control0`,
      'link set control0 up',
      ...wireEnd(node, WIRE),
    ]);
    await batch(ground.netnsPath('control'), [`link set node${node} master control0 up`]);
  }
}

/**
 * How the nth pod of all is linked: eth0, routed by its node (both directions pass the node, as with Calico). Lines of
 * `ip -batch`, by where and in which order they run.
 * @param netns name of the pod's network namespace, as the node knows it
 */
function podLink(netns: string, node: number, n: number) {
  const { v4, v6 } = podAddresses(node, n);
  const host = `pod${n}`;
  return {
    onNode: [
      `link add ${host} type veth peer name eth0 netns ${netns}`,
      `link set ${host} addrgenmode none`,
      `addr add ${GATEWAY_V4}/32 dev ${host}`,
      `addr add ${GATEWAY_V6}/64 dev ${host} nodad`,
      `link set ${host} up`,
    ],
    inPod: [
      'link set lo up',
      'link set eth0 addrgenmode none',
      `addr add ${v4}/32 dev eth0`,
      `addr add ${v6}/128 dev eth0 nodad`,
      'link set eth0 up',
      `route add ${GATEWAY_V4} dev eth0 scope link`,
      `route add default via ${GATEWAY_V4} dev eth0`,
      `route add ::/0 via ${GATEWAY_V6} dev eth0`,
    ],
    routes: [`route add ${v4}/32 dev ${host}`, `route add ${v6}/128 dev ${host}`],
  };
}

/**
 * Script of sh, which ends at its first failure, that makes a network namespace. Settings come at once: they are those of
 * interfaces that are made after them.
 */
function netnsScript(path: string, forwarding: boolean): string {
  return `set -e\nip netns add ${basename(path)}\nnsenter --net=${path} sh -c '${networkSysctls(forwarding)}'`;
}

/**
 * Script of sh, run where the node's network is: a pod's network namespace, linked to its node. One process of it, since those
 * of a guest in software are slow to start.
 * @param path of the namespace, which `ip netns` makes
 * @param wants whether a line of a link is to be there; default all
 */
export function podScript(
  path: string,
  node: number,
  n: number,
  wants: (line: string) => boolean = () => true,
): string {
  const netns = basename(path);
  const link = podLink(netns, node, n);
  const text = (lines: readonly string[]): string => `<<'LINES'\n${lines.filter(wants).join('\n')}\nLINES`;
  return [
    netnsScript(path, false),
    `ip -batch - ${text(link.onNode)}`,
    `ip -n ${netns} -batch - ${text(link.inPod)}`,
    `ip -batch - ${text(link.routes)}`,
  ].join('\n');
}

/** A pod's network namespace. */
export async function makePod(ground: Ground, name: string, node: number, n: number): Promise<void> {
  const script = podScript(ground.netnsPath(name), node, n);
  await must(['nsenter', `--net=${ground.netnsPath(`node${node}`)}`, 'sh', '-c', script]);
}

/**
 * Script of sh for a network namespace: no duplicate address detection (an address is usable at once), no reverse path filter.
 * @param forwarding for a node
 */
export function networkSysctls(forwarding: boolean): string {
  const lines = ['cd /proc/sys/net', 'echo 0 >ipv6/conf/default/accept_dad', 'echo 0 >ipv6/conf/all/accept_dad'];
  lines.push('echo 0 >ipv4/conf/all/rp_filter', 'echo 0 >ipv4/conf/default/rp_filter');
  if (forwarding) lines.push('echo 1 >ipv4/ip_forward', 'echo 1 >ipv6/conf/all/forwarding');
  return lines.join(' && ');
}

/** One port of a Service address and where connections to it go. */
export interface ServiceRule {
  readonly address: string;
  readonly port: number;
  readonly targets: readonly { readonly address: string; readonly port: number }[];
}

/** What kube-proxy does for clients that are not captured: destination NAT of Service addresses, in both nodes. */
export async function applyServiceRules(ground: Ground, rules: readonly ServiceRule[]): Promise<void> {
  const lines: string[] = [];
  for (const family of ['ip', 'ip6']) {
    lines.push(`table ${family} services`, `delete table ${family} services`, `table ${family} services {`);
    lines.push('  chain prerouting {', '    type nat hook prerouting priority dstnat;');
    for (const { address, port, targets } of rules) {
      if (address.includes(':') !== (family === 'ip6') || targets.length === 0) continue;
      const map = targets.map((target, i) => `${i} : ${target.address} . ${target.port}`).join(', ');
      const choice = `numgen random mod ${targets.length} map { ${map} }`;
      lines.push(`    ${family} daddr ${address} tcp dport ${port} dnat ${family} addr . port to ${choice}`);
    }
    lines.push('  }', '}');
  }
  for (const node of ['node1', 'node2']) {
    await must(['nsenter', `--net=${ground.netnsPath(node)}`, 'nft', '-f', '-'], { input: `${lines.join('\n')}\n` });
  }
}
