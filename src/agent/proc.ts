/** What /proc tells of processes and their sockets. Everything in it may end while it is read. */
import { readdirSync } from 'node:fs';

/** TCP_LISTEN, as /proc/net/tcp has it. */
const LISTEN = '0A';

export function processIds(proc = '/proc'): number[] {
  return readdirSync(proc)
    .filter((name) => /^\d+$/.test(name))
    .map(Number);
}

/**
 * Sockets that listen on a port.
 * @param table text of /proc/net/tcp or tcp6
 * @returns inodes
 */
export function listeningInodes(table: string, port: number): string[] {
  const hex = port.toString(16).toUpperCase().padStart(4, '0');
  // "sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode"
  return table
    .split('\n')
    .slice(1)
    .map((line) => line.trim().split(/\s+/))
    .filter(([, local = '', , state]) => state === LISTEN && local.endsWith(`:${hex}`))
    .map((fields) => fields[9] ?? '');
}
