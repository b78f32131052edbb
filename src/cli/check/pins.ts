/** Findings about what agents have pinned below the bpffs. */
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { PIN_DIRECTORY_NAME } from '../../agent/capture.js';
import { pinVersion } from '../../agent/capture-check.js';
import { type Finding, failed, notTried, ok } from './finding.js';
import { isBpffs } from './machine.js';

/** The agents' pin directories below a bpffs. */
export function pinDirectories(bpffs: string): string[] {
  if (!existsSync(bpffs)) return [];
  return readdirSync(bpffs, { withFileTypes: true })
    .filter(({ name }) => name === PIN_DIRECTORY_NAME || name.startsWith(`${PIN_DIRECTORY_NAME}-`))
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => join(bpffs, name));
}

export function pinFinding(bpffs: string): Finding {
  if (!isBpffs(bpffs)) return notTried('PINS', `${bpffs} is no bpffs`);
  const version = pinVersion();
  const seen: string[] = [];
  const foreign: string[] = [];
  for (const directory of pinDirectories(bpffs)) {
    const agent = lockHolder(directory);
    const by = agent === undefined ? 'no agent runs' : `agent is process ${agent}`;
    for (const name of readdirSync(directory)) {
      const pods = name === version ? listOr(join(directory, name, 'pods')).length : 0;
      if (name === version) seen.push(`${directory}/${name}: ${pods} pods, ${by}`);
      else foreign.push(`${directory}/${name}, ${by}`);
    }
  }
  if (foreign.length > 0) {
    return failed(
      'PINS',
      `pins of another version, which an agent of this version (${version}) refuses to stand beside: ${foreign.join('; ')}`,
      `stop that agent and run: ebbtide uninstall --bpffs ${bpffs}`,
    );
  }
  return ok('PINS', seen.length === 0 ? 'none' : `an agent of this version takes them over: ${seen.join('; ')}`);
}

/** The process that has the lock on a pin directory; taking it to find out could be in an agent's way. */
function lockHolder(directory: string): number | undefined {
  const { ino } = statSync(directory);
  for (const line of readFileSync('/proc/locks', 'utf8').split('\n')) {
    // "1: FLOCK  ADVISORY  WRITE 1234 00:1f:456 0 EOF"
    const [, kind, , , pid, file] = line.trim().split(/\s+/);
    if (kind === 'FLOCK' && file?.split(':')[2] === String(ino)) return Number(pid);
  }
  return undefined;
}

function listOr(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}
