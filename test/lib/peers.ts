/** Test programs in pods: a server with one behaviour a port, and clients that report as JSON. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { LabProcess, Pod } from '../../src/lab/index.ts';
import { waitFor } from '../../src/lab/index.ts';

const SERVER = fileURLToPath(new URL('programs/server.py', import.meta.url));
const CLIENT = fileURLToPath(new URL('programs/client.py', import.meta.url));

/** Ports of the server's behaviours (test/lib/programs/server.py, in its order). */
export const PORT = {
  whoami: 9000,
  echo: 9001,
  afterEof: 9002,
  sink: 9003,
  source: 9004,
  finishFirst: 9005,
  reset: 9006,
  watch: 9007,
  stall: 9008,
} as const;

/** Starts the server; what happened to its connections is in `events`. */
export async function startServer(pod: Pod): Promise<LabProcess> {
  const server = await pod.start('server', ['python3', SERVER], 'server.out');
  for (const port of [PORT.whoami, PORT.stall]) await pod.listening(port, server);
  return server;
}

/** The events that the server in this pod has logged. */
export function events(pod: Pod): Record<string, unknown>[] {
  const lines = readFileSync(join(pod.directory, 'server.out'), 'utf8').trim().split('\n');
  return lines.filter((line) => line !== '').map((line) => JSON.parse(line) as Record<string, unknown>);
}

/**
 * Runs a client to its end.
 * @returns its result
 * @throws Error with what it said, when it failed
 */
export async function client(
  pod: Pod,
  command: string,
  host: string,
  port: number,
  argument?: string | number,
  timeoutMs = 60_000,
): Promise<Record<string, unknown>> {
  const argv = clientArgv(command, host, port, argument);
  const result = await pod.run(argv, { timeoutMs });
  if (result.code !== 0) {
    const last = result.stderr.trim().split('\n').at(-1) ?? '';
    throw new Error(`${command} from ${pod.id} to ${host} port ${port} failed (${result.code}): ${last}`);
  }
  return JSON.parse(result.stdout) as Record<string, unknown>;
}

/** @param program where it is, for whom it is not beside this file */
export function clientArgv(
  command: string,
  host: string,
  port: number,
  argument?: string | number,
  program = CLIENT,
): string[] {
  return ['python3', program, command, host, `${port}`, ...(argument === undefined ? [] : [`${argument}`])];
}

/** A client that runs beside the test. */
export class Background {
  readonly #process: LabProcess;
  readonly #file: string;

  private constructor(process: LabProcess, file: string) {
    this.#process = process;
    this.#file = file;
  }

  static async start(
    pod: Pod,
    command: string,
    host: string,
    port: number,
    argument?: string | number,
  ): Promise<Background> {
    const name = `${command}-${Math.random().toString(36).slice(2)}`;
    const process = await pod.start(name, clientArgv(command, host, port, argument), `${name}.out`);
    return new Background(process, join(pod.directory, `${name}.out`));
  }

  /** Resolves when the client has written this to standard error. */
  async said(text: string): Promise<void> {
    await waitFor(
      `${this.#process.name} to say "${text}"`,
      () => readFileSync(this.#process.log, 'utf8').includes(text),
      {
        hint: () => `${this.#process.fate}\n${this.#process.tail()}`,
      },
    );
  }

  get running(): boolean {
    return this.#process.running;
  }

  async result(): Promise<Record<string, unknown>> {
    await this.#process.ended();
    const text = readFileSync(this.#file, 'utf8');
    if (text === '') throw new Error(`${this.#process.name} ended with ${this.#process.fate}: ${this.#process.tail()}`);
    return JSON.parse(text) as Record<string, unknown>;
  }
}
