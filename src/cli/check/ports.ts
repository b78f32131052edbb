/** Who has the ports that proxy and agent listen on, in this network namespace. Read, not tried: a try could be in their way. */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { listeningInodes, processIds } from '../../agent/proc.js';
import { ADMIN_PORT, AGENT_PORT, METRICS_PORT, READINESS_PORT } from '../../mesh/ports.js';
import { type Finding, failed, ok } from './finding.js';

const PORTS: readonly { readonly port: number; readonly use: string }[] = [
  { port: ADMIN_PORT, use: "the proxy's admin interface" },
  { port: METRICS_PORT, use: "the proxy's metrics" },
  { port: READINESS_PORT, use: "the proxy's readiness" },
  { port: AGENT_PORT, use: "the agent's metrics and readiness" },
];

/** Process that holds a socket, as far as this one may see. */
export interface Holder {
  readonly pid: number;
  readonly command: string;
}

/** Whether a command line is that of an agent, a proxy or a controller of Ebbtide. */
export const isOurs = (command: string): boolean =>
  /(^|[/ ])(ebbtide|main\.js)( .*)? (agent|proxy|controller)( |$)/.test(command);

export function portFinding(proc = '/proc'): Finding {
  const tables = ['tcp', 'tcp6'].map((name) => readOr(join(proc, 'self/net', name), ''));
  const taken: string[] = [];
  const own: string[] = [];
  let holders: ReadonlyMap<string, Holder> | undefined;
  for (const { port, use } of PORTS) {
    const inodes = tables.flatMap((table) => listeningInodes(table, port));
    if (inodes.length === 0) continue;
    holders ??= holdersOf(proc);
    const holder = inodes.map((inode) => holders?.get(inode)).find((found) => found !== undefined);
    const by =
      holder === undefined ? 'a process that is not seen from here' : `process ${holder.pid} (${holder.command})`;
    if (holder !== undefined && isOurs(holder.command)) own.push(`${port} by process ${holder.pid}`);
    else taken.push(`${port} (${use}) by ${by}`);
  }
  if (taken.length > 0) {
    return failed(
      'PORTS',
      `taken in this network namespace: ${taken.join('; ')}`,
      'give others to the proxy (EBBTIDE_ADMIN_PORT, EBBTIDE_METRICS_PORT, EBBTIDE_READINESS_PORT) and the agent (--port), or ' +
        'end that process; the DaemonSet has a network of its own, where nobody else is',
    );
  }
  const free = PORTS.length - own.length;
  return ok(
    'PORTS',
    [free > 0 ? `${free} free` : '', own.length > 0 ? `held by Ebbtide: ${own.join(', ')}` : '']
      .filter(Boolean)
      .join('; '),
  );
}

function holdersOf(proc: string): Map<string, Holder> {
  const holders = new Map<string, Holder>();
  for (const pid of processIds(proc)) {
    try {
      const directory = join(proc, String(pid), 'fd');
      for (const fd of readdirSync(directory)) {
        const inode = /^socket:\[(\d+)\]$/.exec(readlinkOr(join(directory, fd)))?.[1];
        if (inode === undefined || holders.has(inode)) continue;
        const command = readFileSync(join(proc, String(pid), 'cmdline'), 'utf8')
          .replaceAll('\0', ' ')
          .trim()
          .slice(0, 200);
        holders.set(inode, { pid, command });
      }
    } catch {
      // It has ended, or is not ours to look at.
    }
  }
  return holders;
}

function readlinkOr(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}

function readOr(path: string, otherwise: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return otherwise;
  }
}
