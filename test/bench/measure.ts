/** Measures one path once: throughput, processor time, round trips, connection rate, memory. */
import { readFileSync } from 'node:fs';
import type { LabProcess, Pod } from '../lib/lab.ts';

export const PORTS = { iperf: 5201, echo: 7001, rate: 7002 } as const;
const CLIENTS = 8;
const TICKS_PER_SECOND = 100;

/** A way from a client pod to a server pod. */
export interface Path {
  readonly name: string;
  readonly client: Pod;
  readonly server: Pod;
  /** What the client connects to. */
  readonly address: string;
  /** The processes that carry the bytes. */
  readonly proxies: () => readonly LabProcess[];
}

export type Figures = Record<string, number>;

/** Gbit/s with parallel streams, and processor seconds per 10^9 bytes of the machine and of the proxies. */
export async function throughput(path: Path, streams: number, seconds: number): Promise<Figures> {
  const proxies = path.proxies().map((process) => process.pid);
  const before = [machineCpu(), processCpu(proxies)] as const;
  const argv = ['iperf3', '-c', path.address, '-p', `${PORTS.iperf}`, '-t', `${seconds}`, '-P', `${streams}`, '-J'];
  const result = await path.client.run(argv, { timeoutMs: (seconds + 30) * 1000 });
  const after = [machineCpu(), processCpu(proxies)] as const;
  const report = JSON.parse(result.stdout || '{}') as {
    error?: string;
    end?: { sum_received?: { bytes: number; bits_per_second: number } };
  };
  const received = report.end?.sum_received;
  if (result.code !== 0 || received === undefined) {
    throw new Error(`iperf3 over ${path.name}, ${streams} streams: ${report.error ?? result.stderr.trim()}`);
  }
  const gigabytes = received.bytes / 1e9;
  return {
    [`gbps_${streams}`]: received.bits_per_second / 1e9,
    [`cpu_s_per_gb_${streams}`]: (after[0] - before[0]) / gigabytes,
    ...(proxies.length === 0 ? {} : { [`proxy_cpu_s_per_gb_${streams}`]: (after[1] - before[1]) / gigabytes }),
  };
}

/** One byte there and back on one connection. */
export async function roundTrip(path: Path, traffic: string, seconds: number): Promise<Figures> {
  const said = await part(path, [traffic, 'ping', path.address, `${PORTS.echo}`, `${seconds}`], seconds);
  return { rtt_p50_us: Number(said.p50_us), rtt_p99_us: Number(said.p99_us) };
}

/** New connections, one byte exchanged on each, eight clients at once; the server closes first. */
export async function connectionRate(path: Path, traffic: string, seconds: number): Promise<Figures> {
  const argv = [traffic, 'rate', path.address, `${PORTS.rate}`, `${seconds}`, `${CLIENTS}`];
  const said = await part(path, argv, seconds);
  if (Number(said.failed) > 0) {
    throw new Error(`${said.failed} of ${said.done} connections over ${path.name} failed: ${said.error}`);
  }
  return { connections_per_s: Number(said.per_second) };
}

async function part(path: Path, argv: readonly string[], seconds: number): Promise<Record<string, unknown>> {
  const result = await path.client.run(argv, { timeoutMs: (seconds + 30) * 1000 });
  if (result.code !== 0)
    throw new Error(`${argv[1]} over ${path.name} ended with ${result.code}: ${result.stderr.trim()}`);
  return JSON.parse(result.stdout) as Record<string, unknown>;
}

/** Resident memory of the bigger one of the proxies, in MB (10^6 bytes). */
export function residentMb(processes: readonly LabProcess[]): number {
  const sizes = processes.map(({ pid }) => {
    const match = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
    return (Number(match?.[1] ?? 0) * 1024) / 1e6;
  });
  return Math.max(0, ...sizes);
}

/** Seconds that the processors were not idle, since boot. */
function machineCpu(): number {
  const [, user, nice, system, , , irq, softirq, steal] = (readFileSync('/proc/stat', 'utf8').split('\n')[0] ?? '')
    .split(/\s+/)
    .map(Number);
  const ticks = [user, nice, system, irq, softirq, steal].reduce<number>((sum, value) => sum + (value ?? 0), 0);
  return ticks / TICKS_PER_SECOND;
}

/** Processor seconds of processes so far (proc(5): utime and stime). */
function processCpu(pids: readonly number[]): number {
  let ticks = 0;
  for (const pid of pids) {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    ticks += Number(fields[11]) + Number(fields[12]);
  }
  return ticks / TICKS_PER_SECOND;
}
