/** The agent as a process on the Kubernetes API, and a ZDS client in the place of its proxy. */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { vi } from 'vitest';
import { connectSeqpacket } from '../../../src/mesh/native-seqpacket.ts';
import { istio } from '../../../src/mesh/proto/generated.js';

const EBBTIDE = fileURLToPath(new URL('../../../dist/main.js', import.meta.url));
const { WorkloadRequest, WorkloadResponse, ZdsHello } = istio.workload.zds;

export class AgentProcess {
  output = '';
  readonly process: ChildProcess;
  readonly exit: Promise<number | string>;

  /** @param netns path of the network namespace to be started in, instead of this process's own */
  constructor(flags: readonly string[], env: NodeJS.ProcessEnv, netns?: string) {
    const argv = [process.execPath, EBBTIDE, 'agent', ...flags];
    if (netns !== undefined) argv.unshift('nsenter', `--net=${netns}`);
    const [command = '', ...rest] = argv;
    this.process = spawn(command, rest, {
      env: { ...process.env, KUBERNETES_SERVICE_HOST: '', ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    for (const stream of [this.process.stdout, this.process.stderr]) {
      stream?.on('data', (chunk) => {
        this.output += String(chunk);
      });
    }
    this.exit = new Promise((resolve) => {
      this.process.once('exit', (code, signal) => resolve(signal ?? code ?? -1));
    });
  }

  /** Log lines of an event. */
  events(event: string): Record<string, unknown>[] {
    return this.output
      .split('\n')
      .filter((line) => line.includes(`"event":"${event}"`))
      .map((line) => JSON.parse(line) as Record<string, unknown>);
  }

  async logged(event: string, times = 1): Promise<Record<string, unknown>> {
    return vi.waitFor(
      () => {
        const found = this.events(event)[times - 1];
        if (found === undefined) throw new Error(`the agent logged no ${event}:\n${this.output.slice(-4000)}`);
        return found;
      },
      { timeout: 30_000, interval: 20 },
    );
  }

  /** Asks its HTTP port. */
  async get(path: string): Promise<{ readonly status: number; readonly text: string }> {
    const { port } = (await this.logged('http_listening')) as { port: number };
    const response = await fetch(`http://127.0.0.1:${port}${path}`);
    return { status: response.status, text: await response.text() };
  }

  async end(signal: NodeJS.Signals): Promise<number | string> {
    if (this.process.exitCode === null && this.process.signalCode === null) this.process.kill(signal);
    return await this.exit;
  }
}

/** Acknowledges what it is told, and writes it down. */
export class ZdsProxy {
  readonly got: string[] = [];
  closed = false;
  answers = true;
  readonly #socket;

  constructor(path: string) {
    this.#socket = connectSeqpacket(path);
    this.#socket.onClose(() => {
      this.closed = true;
    });
    this.#socket.onMessage(({ data, fds }) => {
      const { add, del, keep } = WorkloadRequest.decode(data);
      this.got.push(add ? `add ${add.uid}` : del ? `del ${del.uid}` : keep ? `keep ${keep.uid}` : 'snapshotSent');
      for (const fd of fds) closeSync(fd);
      if (this.answers) void this.#socket.send(WorkloadResponse.encode({ ack: {} }).finish());
    });
    void this.#socket.send(ZdsHello.encode({ version: 1 }).finish());
  }

  close(): void {
    this.#socket.close();
  }
}
