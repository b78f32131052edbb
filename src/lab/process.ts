/** Long-running processes of a lab: each in a network namespace and cgroup, its output in a file, ended by its id. */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { killGroup } from './exec.js';

/** Where a process runs. */
export interface Place {
  /** Path of the network namespace. */
  readonly netns: string;
  /** Directory of the cgroup. */
  readonly cgroup: string;
}

/**
 * Command that moves itself to a place and becomes the given one: the process id stays. Entered with nsenter, since
 * `ip netns exec` mounts another /sys, in which cgroups and bpffs are not found.
 */
export function placed(place: Place, argv: readonly string[]): string[] {
  const script = 'echo 0 >"$1/cgroup.procs" && n=$2 && shift 2 && exec nsenter --net="$n" -- "$@"';
  return ['sh', '-c', script, 'sh', place.cgroup, place.netns, ...argv];
}

export interface StartOptions {
  readonly env?: NodeJS.ProcessEnv;
  /** File that gets standard output and standard error, appended. */
  readonly log: string;
  /** File that gets standard output instead. */
  readonly stdout?: string;
}

/** A started process. */
export class LabProcess {
  readonly name: string;
  readonly pid: number;
  readonly log: string;
  readonly #child: ChildProcess;
  readonly #ended: Promise<void>;

  private constructor(name: string, child: ChildProcess, pid: number, log: string) {
    this.name = name;
    this.pid = pid;
    this.log = log;
    this.#child = child;
    this.#ended = new Promise((resolve) => child.once('close', () => resolve()));
  }

  /** Starts a process; rejects when the program does not exist. */
  static async start(name: string, place: Place, argv: readonly string[], options: StartOptions): Promise<LabProcess> {
    const log = openSync(options.log, 'a');
    const out = options.stdout === undefined ? log : openSync(options.stdout, 'a');
    try {
      const [program = '', ...args] = placed(place, argv);
      const child = spawn(program, args, {
        detached: true,
        stdio: ['ignore', out, log],
        env: { ...process.env, ...options.env },
      });
      await new Promise<void>((resolve, reject) => {
        child.once('spawn', resolve);
        child.once('error', reject);
      });
      if (child.pid === undefined) throw new Error(`${name} has no process id`);
      return new LabProcess(name, child, child.pid, options.log);
    } finally {
      if (out !== log) closeSync(out);
      closeSync(log);
    }
  }

  get running(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** "exit code 1" or "signal SIGKILL"; "running". */
  get fate(): string {
    if (this.running) return 'running';
    return this.#child.signalCode === null ? `exit code ${this.#child.exitCode}` : `signal ${this.#child.signalCode}`;
  }

  get exitCode(): number | null {
    return this.#child.exitCode;
  }

  /** Resolves when the process has ended. */
  ended(): Promise<void> {
    return this.#ended;
  }

  /** Sends a signal to the process and those it started. */
  signal(signal: NodeJS.Signals): void {
    if (this.running) killGroup(this.pid, signal);
  }

  /**
   * Asks the process to end, and kills it after the grace time.
   * @returns whether it ended by itself in time
   */
  async stop(signal: NodeJS.Signals = 'SIGTERM', graceMs = 10_000): Promise<boolean> {
    if (!this.running) return true;
    this.signal(signal);
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), graceMs);
    });
    const inTime = await Promise.race([this.#ended.then(() => true), late]);
    clearTimeout(timer);
    if (!inTime) {
      this.signal('SIGKILL');
      await this.#ended;
    }
    return inTime;
  }

  /** The log's last lines, for an error message. */
  tail(lines = 15): string {
    const text = readFileSync(this.log, 'utf8').trimEnd();
    return text.split('\n').slice(-lines).join('\n');
  }
}
