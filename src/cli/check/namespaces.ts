/** The network namespaces of this machine that have processes, and the finding about their ephemeral ports. */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { readInNetns, targetPorts } from '../../agent/capture-check.js';
import { closeFd, openNetns } from '../../agent/netns.js';
import { processIds } from '../../agent/proc.js';
import { type Finding, notTried, ok, some, warning } from './finding.js';

/** One process of a network namespace. */
export interface NetnsProcess {
  readonly pid: number;
  /** " (process 12 nginx is in it)" */
  readonly text: string;
}

const MOST = 5000;

/** By inode. */
export function networkNamespaces(proc = '/proc'): Map<bigint, NetnsProcess> {
  const found = new Map<bigint, NetnsProcess>();
  for (const pid of processIds(proc)) {
    if (found.size >= MOST) break;
    try {
      const { ino } = statSync(join(proc, String(pid), 'ns/net'), { bigint: true });
      if (found.has(ino)) continue;
      const comm = readFileSync(join(proc, String(pid), 'comm'), 'utf8').trim();
      found.set(ino, { pid, text: ` (process ${pid} ${comm} is in it)` });
    } catch {
      // It has ended, or is not ours to look at.
    }
  }
  return found;
}

/** Whether two ranges of ports have one in common. @param range text of ip_local_port_range */
export function overlaps(range: string, [first, last]: readonly [number, number]): boolean {
  const [from = Number.NaN, to = Number.NaN] = range.trim().split(/\s+/).map(Number);
  return from <= last && first <= to;
}

/** @param node path of the node's own network namespace, which is no pod's */
export function portRangeFinding(namespaces: ReadonlyMap<bigint, NetnsProcess>, node: string): Finding {
  const own = statSync(node, { bigint: true }).ino;
  const used = targetPorts();
  const bad: string[] = [];
  let looked = 0;
  for (const [inode, { pid, text }] of namespaces) {
    if (inode === own) continue;
    try {
      const fd = openNetns(`/proc/${pid}/ns/net`);
      try {
        const range = readInNetns(fd, '/proc/sys/net/ipv4/ip_local_port_range');
        looked++;
        if (overlaps(range, used)) bad.push(`${inode}${text}: ${range.trim().replace(/\s+/, '-')}`);
      } finally {
        closeFd(fd);
      }
    } catch {
      // Its last process has ended.
    }
  }
  if (bad.length > 0) {
    return warning(
      'PORT_RANGE',
      `net.ipv4.ip_local_port_range holds some of ${used.join('-')} in network namespace ${some(bad)}`,
      'captured connections are sent to those ports of the loopback, where a socket of the pod could be: begin the range above them',
    );
  }
  if (looked === 0)
    return notTried('PORT_RANGE', 'there is no other network namespace with processes than that of the node');
  return ok('PORT_RANGE', `${looked} network namespaces, all clear of ${used.join('-')}`);
}
