/** A qemu process: its arguments, its monitor (QMP), whether it can use KVM. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { join } from 'node:path';
import { sleep, waitFor } from '../../../src/lab/wait.ts';
import { cacheDirectory } from './place.ts';

export const QEMU = 'qemu-system-x86_64';

export type Accelerator = 'kvm' | 'tcg';

let accelerator: Accelerator | undefined;

/**
 * What runs guests: KVM where it works, otherwise software. A /dev/kvm may be there and not run anything (inside of a virtual
 * machine), so it is tried with a kernel that must come to its end.
 * @param kernel path of a kernel image
 */
export function findAccelerator(kernel: string, env: NodeJS.ProcessEnv = process.env): Accelerator {
  const asked = env.EBBTIDE_VM_ACCELERATOR;
  if (asked === 'kvm' || asked === 'tcg') return asked;
  accelerator ??= tryKvm(kernel) ? 'kvm' : 'tcg';
  return accelerator;
}

function tryKvm(kernel: string): boolean {
  if (!existsSync('/dev/kvm')) return false;
  const memory = join(cacheDirectory(), 'kvm');
  const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
  const [of, said] = existsSync(memory) ? readFileSync(memory, 'utf8').trim().split(' ') : [];
  if (of === boot) return said === 'works';
  // Without a root the kernel panics, which resets the machine, which ends qemu.
  const argv = ['-accel', 'kvm', '-cpu', 'host', '-m', '256', '-nodefaults', '-display', 'none', '-no-reboot'];
  const tried = spawnSync(QEMU, [...argv, '-kernel', kernel, '-append', 'panic=-1'], {
    stdio: 'ignore',
    timeout: 6000,
    killSignal: 'SIGKILL',
  });
  const works = tried.status === 0;
  writeFileSync(memory, `${boot} ${works ? 'works' : 'fails'}\n`);
  return works;
}

/** Arguments of the processor and its accelerator. */
export function processorArguments(kind: Accelerator, cpus: number): string[] {
  // In software an old processor is faster than a new one: wide vectors and more levels of page tables cost much.
  const model =
    kind === 'kvm'
      ? ['-accel', 'kvm', '-cpu', 'host']
      : ['-accel', 'tcg,thread=multi', '-cpu', 'Nehalem,+aes,+pclmulqdq'];
  return [...model, '-smp', `${cpus}`];
}

/** The monitor of a running qemu. */
export class Monitor {
  readonly #socket: Socket;
  #waiting: ((answer: { error?: { desc: string }; return?: unknown }) => void)[] = [];
  #closed: Error | undefined;

  private constructor(socket: Socket) {
    this.#socket = socket;
    let rest = '';
    socket.setEncoding('utf8');
    socket.on('data', (text: string) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop() ?? '';
      for (const line of lines) {
        const message = JSON.parse(line) as { error?: { desc: string }; return?: unknown };
        if ('error' in message || 'return' in message) this.#waiting.shift()?.(message);
      }
    });
    const end = (): void => {
      this.#closed ??= new Error('qemu has ended');
      for (const wake of this.#waiting.splice(0)) wake({ error: { desc: this.#closed.message } });
    };
    socket.on('error', end);
    socket.on('close', end);
  }

  /** Connects to the socket of a qemu that is starting. */
  static async connect(path: string, lives: () => boolean): Promise<Monitor> {
    const monitor = new Monitor(await connectTo(path, lives));
    await monitor.do('qmp_capabilities');
    return monitor;
  }

  /** Executes a command of QMP and returns its answer. @throws Error with qemu's description */
  do(command: string, args: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    if (this.#closed) return Promise.reject(this.#closed);
    return new Promise((resolve, reject) => {
      this.#waiting.push(({ error, return: answer }) => {
        if (error) reject(new Error(`qemu: ${command}: ${error.desc}`));
        else resolve(answer);
      });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
    });
  }

  close(): void {
    this.#socket.destroy();
  }
}

/** Connects to a Unix socket that a starting process is about to make. */
export async function connectTo(path: string, lives: () => boolean): Promise<Socket> {
  return waitFor(
    `a connection to ${path}`,
    async () => {
      if (!lives()) return undefined;
      return await new Promise<Socket | undefined>((resolve) => {
        const socket = createConnection(path);
        socket.once('connect', () => resolve(socket));
        socket.once('error', () => resolve(undefined));
      });
    },
    { timeoutMs: 20_000, intervalMs: 20 },
  );
}

/** Starts qemu so that it ends when this process does, however that ends. */
export function startQemu(argv: readonly string[]): ChildProcess {
  return spawn('setpriv', ['--pdeathsig', 'KILL', QEMU, ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  });
}

/** Kills a process that this one started and waits for its end. */
export async function endProcess(child: ChildProcess): Promise<void> {
  while (child.exitCode === null && child.signalCode === null) {
    child.kill('SIGKILL');
    await sleep(20);
  }
}
