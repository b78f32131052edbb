/** `ebbtide status`: which pods of this node are in the mesh, asked from the agent, which asks the datapath. */
import { uptime } from 'node:os';
import { Command, Option } from 'commander';
import type { PodReport } from '../agent/pods.js';
import { statusSocketOf, zdsSocketOf } from '../agent/settings.js';
import { type AgentStatus, readStatus } from '../agent/status.js';

/** Everything that is wanted is captured and served. */
const ALL_CAPTURED = 0;
const NOT_ALL_CAPTURED = 1;
const CANNOT_ASK = 2;

const HEADINGS = ['POD', 'LABEL', 'STATE', 'PROGRAMS', 'LISTENERS', 'LAST CONNECTION', 'REASON'] as const;

/** `ebbtide status [pod]`: exit code 0 all captured, 1 something wanted is not, 2 the agent cannot be asked. */
export function statusCommand(): Command {
  return new Command('status')
    .description("Show this node's pods: label, programs, listeners, last captured connection.")
    .argument('[pod]', 'only this pod: NAMESPACE/NAME, NAME or uid')
    .option('--socket <path>', "the agent's status socket", statusSocketOf(zdsSocketOf(process.env)))
    .addOption(new Option('--output <format>', 'what is printed').choices(['table', 'json']).default('table'))
    .addHelpText(
      'after',
      '\nEnvironment:\n  INPOD_UDS  as the agent has it; its status socket is at the same path + .status' +
        '\n\nExit code: 0 all captured, 1 something wanted is not captured, 2 the agent cannot be asked or has no such pod',
    )
    .action(async (pod: string | undefined, options: { socket: string; output: 'table' | 'json' }) => {
      process.exitCode = await showStatus(pod, options);
    });
}

async function showStatus(
  name: string | undefined,
  { socket, output }: { readonly socket: string; readonly output: 'table' | 'json' },
): Promise<number> {
  let status: AgentStatus;
  try {
    status = await readStatus(socket);
  } catch (error) {
    process.stderr.write(`${(error as Error).message}\n`);
    return CANNOT_ASK;
  }
  const pods = status.pods.filter((pod) => name === undefined || isNamed(pod, name));
  if (name !== undefined && pods.length === 0) {
    process.stderr.write(`node ${status.node} has no pod ${name}; its pods: ${status.pods.map(nameOf).join(', ')}\n`);
    return CANNOT_ASK;
  }
  if (output === 'json') process.stdout.write(`${JSON.stringify({ ...status, pods }, null, 2)}\n`);
  else process.stdout.write(tableOf({ ...status, pods }, bootTimeNs()));
  return pods.every(isAsWanted) ? ALL_CAPTURED : NOT_ALL_CAPTURED;
}

const nameOf = ({ namespace, name, uid }: PodReport): string => (name === '' ? uid : `${namespace}/${name}`);

function isNamed(pod: PodReport, name: string): boolean {
  return name === pod.uid || name === pod.name || name === nameOf(pod);
}

/** Whether the datapath does what the label asks for: programs attached, and listeners of a proxy to be steered to. */
export function isAsWanted({ wanted, capture }: PodReport): boolean {
  if (!wanted) return true;
  if (capture === undefined) return false;
  const { outbound, inbound, guard, listeners } = capture;
  return outbound && inbound && guard === 'attached' && Object.values(listeners).every((count) => count > 0);
}

/**
 * The status as text: a line a pod, then what is wrong with the manifests.
 * @param nowNs CLOCK_BOOTTIME, as the datapath dates connections
 */
export function tableOf(status: AgentStatus, nowNs: bigint): string {
  const rows = status.pods.map((pod) => [
    nameOf(pod),
    pod.wanted ? 'in the mesh' : 'not',
    pod.state,
    programsOf(pod),
    listenersOf(pod),
    lastConnectionOf(pod, nowNs),
    pod.reason,
  ]);
  const table = [[...HEADINGS], ...rows];
  const widths = HEADINGS.map((_, column) => Math.max(...table.map((row) => (row[column] ?? '').length)));
  const lines = table.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join('  ')
      .trimEnd(),
  );
  const proxies = status.proxies.length === 0 ? 'no proxy is connected' : `proxy ${status.proxies.join(', ')}`;
  const problems = status.problems.map(({ file, line, message }) => {
    return `${file}${line === undefined ? '' : `:${line}`}: ${message}`;
  });
  return `${[`node ${status.node}, ${proxies}`, ...lines, ...problems].join('\n')}\n`;
}

function programsOf({ capture }: PodReport): string {
  if (capture === undefined) return '-';
  const { outbound, inbound, guard } = capture;
  const parts = [outbound ? 'outbound' : 'NO outbound', inbound ? 'inbound' : 'NO inbound'];
  parts.push(guard === 'attached' ? 'guard' : `NO guard (${guard})`);
  return parts.join(', ');
}

function listenersOf({ capture }: PodReport): string {
  if (capture === undefined) return '-';
  const { outbound, hbone, plaintext } = capture.listeners;
  return `outbound ${outbound}, hbone ${hbone}, plaintext ${plaintext}`;
}

function lastConnectionOf({ capture }: PodReport, nowNs: bigint): string {
  const at = BigInt(capture?.lastCaptureNs ?? 0);
  if (at === 0n) return '-';
  return `${Math.max(0, Math.round(Number(nowNs - at) / 1e9))} s ago`;
}

/** CLOCK_BOOTTIME, of which the system's uptime is the reading with hundredths of a second. */
function bootTimeNs(): bigint {
  return BigInt(Math.round(uptime() * 1e9));
}
