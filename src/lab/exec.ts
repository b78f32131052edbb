/** Runs commands of the system to their end, with a deadline, and says what failed and how. */
import { spawn } from 'node:child_process';
import { patient } from './wait.js';

/** What a command that ended said. */
export interface Finished {
  /** Exit code; 128 + signal number when a signal ended it, 124 when the deadline did. */
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly input?: string | Buffer;
  /** Default 30 s, {@link patient} applied to it; the process group is killed then. */
  readonly timeoutMs?: number;
  readonly env?: NodeJS.ProcessEnv;
  readonly cwd?: string;
}

const TIMED_OUT = 124;

/** Runs a command to its end; never rejects because of its exit code, only when it cannot be started. */
export function run(argv: readonly string[], options: RunOptions = {}): Promise<Finished> {
  const [program, ...args] = argv;
  if (program === undefined) throw new Error('no command given');
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      detached: true,
      stdio: 'pipe',
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
      env: options.env === undefined ? process.env : { ...process.env, ...options.env },
    });
    const stdout: Buffer[] = [];
    const stderr: Buffer[] = [];
    let timedOut = false;
    const timer = setTimeout(
      () => {
        timedOut = true;
        if (child.pid !== undefined) killGroup(child.pid, 'SIGKILL');
      },
      patient(options.timeoutMs ?? 30_000),
    );
    child.stdout.on('data', (chunk: Buffer) => stdout.push(chunk));
    child.stderr.on('data', (chunk: Buffer) => stderr.push(chunk));
    child.on('error', (error) => {
      clearTimeout(timer);
      reject(new Error(`cannot start ${program}: ${error.message}`));
    });
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      resolve({
        code: timedOut ? TIMED_OUT : (code ?? 128 + (signal === 'SIGKILL' ? 9 : 15)),
        stdout: Buffer.concat(stdout).toString('utf8'),
        stderr: Buffer.concat(stderr).toString('utf8'),
      });
    });
    // A command that ends without reading its input is no error of ours.
    child.stdin.on('error', () => {});
    child.stdin.end(options.input);
  });
}

/** Runs a command that must succeed. @returns its standard output. @throws Error with the command and what it said */
export async function must(argv: readonly string[], options: RunOptions = {}): Promise<string> {
  const result = await run(argv, options);
  if (result.code !== 0) {
    const said = (result.stderr.trim() || result.stdout.trim() || 'nothing said').slice(0, 2000);
    throw new Error(`\`${argv.join(' ')}\` ended with ${result.code}: ${said}`);
  }
  return result.stdout;
}

/** Signals a process group; one that is gone already is no error. */
export function killGroup(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(-pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
