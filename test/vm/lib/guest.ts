/**
 * A guest: a virtual machine with one of Debian's kernels, this machine's Debian userland, and this checkout as it is at
 * /ebbtide with its packages. Commands come by a virtio port, so a guest needs no network. Nothing of a run stays, except on
 * a state disk. Every guest must be disposed of, also after a failure; it ends with this process in any case.
 */
import type { ChildProcess } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import type { Finished } from '../../../src/lab/exec.ts';
import { encodeCommand, encodeFrame, FrameReader, ToGuest } from './frames.ts';
import { GuestProcess } from './guest-process.ts';
import { checkoutImage, packagesImage, stateDisk, userlandImage } from './images.ts';
import { buildInit, findKernel, initialDisk, type Kernel, type KernelName } from './kernels.ts';
import { keepsPlaces, makePlace, removePlace } from './place.ts';
import {
  type Accelerator,
  connectTo,
  endProcess,
  findAccelerator,
  Monitor,
  processorArguments,
  startQemu,
} from './qemu.ts';
import type { Wire } from './wire.ts';

/** An interface of a guest; the nth of `networks` is eth0, eth1, ... */
export interface GuestNetwork {
  readonly wire: Wire;
  /** Default: made from the guest's hostname and the interface's number. */
  readonly mac?: string;
  /** File for all packets in both directions, in libpcap's format; written by qemu, goes on over resets. */
  readonly record?: string;
  /** Largest packet the guest is told it may send; default 1500. */
  readonly mtu?: number;
}

export interface GuestOptions {
  readonly kernel: KernelName;
  /** Default 1024. */
  readonly memoryMb?: number;
  /** Default 2. */
  readonly cpus?: number;
  readonly networks?: readonly GuestNetwork[];
  /** A disk that keeps what is written over {@link Guest.reset}, at /state; a path: a file that also outlives the guest. */
  readonly state?: boolean | string;
  /** Seconds that the guest's clock is ahead of the host's, at each boot. */
  readonly clock?: number;
  /** systemd is the first process; what it has in /etc/systemd/system and /opt is kept on the state disk. */
  readonly systemd?: boolean;
  /** More words of the kernel's command line. */
  readonly cmdline?: string;
  /** Default `guest`. */
  readonly hostname?: string;
}

export interface GuestRunOptions {
  readonly input?: string | Buffer;
  /** Default 60 s in each case; the command's process group is killed then and the code is 124. */
  readonly timeoutMs?: number;
  readonly env?: Readonly<Record<string, string>>;
  /** Default /ebbtide. */
  readonly cwd?: string;
  /** Called with what it says, as it says it. */
  readonly onOutput?: (text: string) => void;
}

/** Software emulation of a busy machine: half a minute is not unheard of. */
const BOOT_TIMEOUT_MS = 180_000;
const COMMAND_TIMEOUT_MS = 60_000;
const PANIC = /Kernel panic - not syncing[^\n]*|^guest: (?!no |cgroup )[^\n]*/m;

export class Guest {
  readonly kernel: Kernel;
  readonly accelerator: Accelerator;
  readonly directory: string;
  /** From the start of qemu, or a reset, until the guest took commands, in milliseconds. */
  bootMs = 0;
  readonly #qemu: ChildProcess;
  readonly #reader = new FrameReader();
  readonly #processes = new Map<number, GuestProcess>();
  readonly #said: string[] = [];
  #socket: Socket | undefined;
  #monitor: Monitor | undefined;
  #booted: (() => void) | undefined;
  #lastId = 0;
  #afterCut: Promise<void> | undefined;
  #cutAt = 0;
  #bootedFrom = 0;
  #over: string | undefined;
  readonly #watch: NodeJS.Timeout;

  /** Use {@link startGuest}. */
  constructor(kernel: Kernel, accelerator: Accelerator, directory: string, argv: readonly string[]) {
    this.kernel = kernel;
    this.accelerator = accelerator;
    this.directory = directory;
    this.#qemu = startQemu(argv);
    for (const stream of [this.#qemu.stdout, this.#qemu.stderr])
      stream?.setEncoding('utf8').on('data', (text: string) => this.#said.push(text));
    this.#qemu.on('error', (error) => this.#end(`qemu could not be started: ${error.message}`));
    this.#watch = setInterval(() => this.#lookForPanic(), 500);
    this.#watch.unref();
    this.#qemu.on('exit', (code, signal) => this.#end(`qemu ended (${signal ?? code}) ${this.#said.join('')}`));
  }

  /** What the kernel and the first process printed, since the guest was started. */
  get console(): string {
    const file = join(this.directory, 'console');
    return existsSync(file) ? readFileSync(file, 'utf8') : '';
  }

  /** Whether qemu runs. */
  get running(): boolean {
    return this.#over === undefined;
  }

  /** For {@link startGuest}. */
  async connect(): Promise<void> {
    const started = performance.now();
    const booted = this.#nextBoot();
    // Rejected where qemu ends before anybody waits for it.
    booted.catch(() => {});
    this.#monitor = await Monitor.connect(join(this.directory, 'qmp'), () => this.#lives());
    this.#socket = await connectTo(join(this.directory, 'command'), () => this.#lives());
    this.#socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    this.#socket.on('error', () => {});
    await booted;
    this.bootMs = performance.now() - started;
  }

  /**
   * Runs a command to its end; a string is a script of bash. Never rejects because of the exit code.
   * @returns exit code (128 + signal number, 124 after the timeout) and what it said
   * @throws Error when the guest ends, panics or is reset meanwhile
   */
  async run(command: readonly string[] | string, options: GuestRunOptions = {}): Promise<Finished> {
    const process = this.start(command, options);
    process.end(options.input);
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      process.kill(9);
    }, options.timeoutMs ?? COMMAND_TIMEOUT_MS);
    try {
      const code = await process.ended;
      return { code: timedOut ? 124 : code, stdout: process.stdout, stderr: process.stderr };
    } finally {
      clearTimeout(timer);
    }
  }

  /** The same for what must succeed. @returns standard output @throws Error with the command and what it said */
  async must(command: readonly string[] | string, options: GuestRunOptions = {}): Promise<string> {
    const result = await this.run(command, options);
    if (result.code === 0) return result.stdout;
    const text = typeof command === 'string' ? command : command.join(' ');
    const said = (result.stderr.trim() || result.stdout.trim() || 'nothing said').slice(-4000);
    throw new Error(`\`${text}\` in a guest with ${this.kernel.release} ended with ${result.code}: ${said}`);
  }

  /** Starts a command that goes on beside others. */
  start(
    command: readonly string[] | string,
    options: Pick<GuestRunOptions, 'env' | 'cwd' | 'onOutput'> = {},
  ): GuestProcess {
    if (this.#over !== undefined || !this.#socket) throw new Error(this.#over ?? 'the guest has not booted');
    const argv = typeof command === 'string' ? ['bash', '-c', command] : command;
    const id = ++this.#lastId;
    const send = (type: number, payload?: Buffer): void => void this.#socket?.write(encodeFrame(id, type, payload));
    const process = new GuestProcess(send, options.onOutput);
    this.#processes.set(id, process);
    process.closed.then(
      () => this.#processes.delete(id),
      () => this.#processes.delete(id),
    );
    const payload = encodeCommand(argv, options.cwd ?? '/ebbtide', options.env ?? {});
    this.#socket.write(encodeFrame(id, ToGuest.run, payload));
    return process;
  }

  /** A power cut, and the next boot: nothing is written or closed. Resolves when the guest takes commands again. */
  async reset(): Promise<void> {
    await this.cut();
    await this.booted();
  }

  /** The power cut alone; {@link booted} waits for the boot that follows. */
  async cut(): Promise<void> {
    this.#reader.restart();
    this.#afterCut = this.#nextBoot();
    this.#afterCut.catch(() => {});
    this.#cutAt = performance.now();
    for (const process of this.#processes.values()) process.fail(new Error('the guest was reset'));
    this.#processes.clear();
    await this.qmp('system_reset');
  }
  /** Resolves when the guest takes commands after {@link cut}. */
  async booted(): Promise<void> {
    await this.#afterCut;
    this.bootMs = performance.now() - this.#cutAt;
  }

  /** Power off without a word, for good. */
  async powerOff(): Promise<void> {
    await endProcess(this.#qemu);
  }

  /** Plugs the nth interface's cable in or out, as the guest sees it (carrier). */
  async link(n: number, up: boolean): Promise<void> {
    await this.qmp('set_link', { name: `net${n}`, up });
  }

  /** A command of qemu's monitor. */
  qmp(command: string, args: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    if (!this.#monitor) throw new Error('the monitor is not connected');
    return this.#monitor.do(command, args);
  }

  /** Ends it and removes what it had. */
  async dispose(): Promise<void> {
    clearInterval(this.#watch);
    await endProcess(this.#qemu);
    this.#socket?.destroy();
    this.#monitor?.close();
    if (keepsPlaces()) process.stderr.write(`kept: ${this.directory} (console, disks)\n`);
    else removePlace(this.directory);
  }

  #lives(): boolean {
    if (this.#over !== undefined) throw new Error(this.#over);
    return true;
  }

  #end(why: string): void {
    this.#over ??= why;
    for (const process of this.#processes.values()) process.fail(new Error(this.#over));
    this.#processes.clear();
  }

  /** A guest that is dead must not be waited for. */
  #lookForPanic(): void {
    const panic = PANIC.exec(this.console.slice(this.#bootedFrom));
    if (panic === null) return;
    const error = new Error(`a guest with ${this.kernel.release}: ${panic[0]}\n${this.console.slice(-3000)}`);
    for (const process of this.#processes.values()) process.fail(error);
    this.#processes.clear();
  }

  /** The next greeting. @throws Error with the end of the console when there is none, or a panic */
  #nextBoot(): Promise<void> {
    const from = this.console.length;
    this.#bootedFrom = from;
    return new Promise((resolve, reject) => {
      const deadline = performance.now() + BOOT_TIMEOUT_MS;
      const stop = (error?: Error): void => {
        clearInterval(watch);
        this.#booted = undefined;
        if (error) reject(error);
        else resolve();
      };
      const watch = setInterval(() => {
        const said = this.console.slice(from);
        const panic = PANIC.exec(said)?.[0];
        const why = this.#over ?? panic ?? (performance.now() > deadline ? 'it took too long' : undefined);
        if (why) stop(new Error(`a guest with ${this.kernel.release} did not boot: ${why}\n${said.slice(-3000)}`));
      }, 200);
      this.#booted = () => stop();
    });
  }

  #receive(chunk: Buffer): void {
    const { frames, greeting } = this.#reader.push(chunk);
    if (greeting !== undefined) {
      this.#socket?.write(greeting);
      this.#booted?.();
    }
    for (const frame of frames) this.#processes.get(frame.id)?.receive(frame);
  }
}

/** Boots a guest. Images are built where they are not cached; the checkout's at each start, from what is there now. */
export async function startGuest(options: GuestOptions): Promise<Guest> {
  const kernel = await findKernel(options.kernel);
  const [userland, packages, init] = [await userlandImage(), await packagesImage(), await buildInit()];
  const directory = makePlace();
  let guest: Guest | undefined;
  try {
    const accelerator = findAccelerator(kernel.image);
    const checkout = join(directory, 'checkout.img');
    const initrd = join(directory, 'initrd');
    await checkoutImage(checkout);
    await initialDisk(kernel, init, initrd);
    const disks = [
      ...Object.entries({ userland, packages, checkout, modules: kernel.modules }).map(([serial, file]) => ({
        serial,
        drive: `file=${file},readonly=on`,
      })),
    ];
    if (options.state !== undefined && options.state !== false) {
      const file = options.state === true ? join(directory, 'state.img') : options.state;
      await stateDisk(file);
      disks.push({ serial: 'state', drive: `file=${file}` });
    }
    const argv = [
      ...processorArguments(accelerator, options.cpus ?? 2),
      ...['-m', `${options.memoryMb ?? 1024}`, '-machine', 'q35', '-nodefaults', '-no-user-config', '-display', 'none'],
      ...['-kernel', kernel.image, '-initrd', initrd, '-append', commandLine(options)],
      ...['-chardev', `file,id=console,path=${join(directory, 'console')}`, '-serial', 'chardev:console'],
      ...['-qmp', `unix:${join(directory, 'qmp')},server=on,wait=off`],
      ...['-chardev', `socket,id=command,path=${join(directory, 'command')},server=on,wait=off`],
      ...['-device', 'virtio-serial-pci', '-device', 'virtserialport,chardev=command,name=ebb.command'],
      ...['-device', 'virtio-rng-pci', '-rtc', 'base=utc'],
      ...disks.flatMap(({ serial, drive }) => [
        ...['-drive', `if=none,id=${serial},format=raw,${drive}`],
        ...['-device', `virtio-blk-pci,drive=${serial},serial=${serial}`],
      ]),
    ];
    for (const [n, network] of (options.networks ?? []).entries())
      argv.push(...(await networkArguments(network, n, options.hostname ?? 'guest')));
    guest = new Guest(kernel, accelerator, directory, argv);
    await guest.connect();
    return guest;
  } catch (error) {
    if (guest) await guest.dispose();
    else removePlace(directory);
    throw error;
  }
}

function commandLine(options: GuestOptions): string {
  return [
    // What real nodes do about processor bugs costs much in software and changes nothing here.
    ...['console=ttyS0', 'loglevel=4', 'panic=0', 'mitigations=off', 'net.ifnames=0', 'random.trust_cpu=on'],
    `ebb.hostname=${options.hostname ?? 'guest'}`,
    ...(options.clock === undefined ? [] : [`ebb.clock=${options.clock}`]),
    // A login on the console would wait a minute and a half for a device that no udev announces.
    ...(options.systemd === true
      ? ['ebb.init=/lib/systemd/systemd', 'systemd.show_status=no', 'systemd.getty_auto=no']
      : []),
    ...(options.cmdline === undefined ? [] : [options.cmdline]),
  ].join(' ');
}

async function networkArguments(network: GuestNetwork, n: number, hostname: string): Promise<string[]> {
  const id = `net${n}`;
  const mac = network.mac ?? defaultMac(hostname, n);
  const mtu = network.mtu === undefined ? '' : `,host_mtu=${network.mtu}`;
  return [
    ...['-netdev', await network.wire.plug(id), '-device', `virtio-net-pci,id=nic${n},netdev=${id},mac=${mac}${mtu}`],
    ...(network.record === undefined
      ? []
      : ['-object', `filter-dump,id=dump${n},netdev=${id},file=${network.record},maxlen=70000`]),
  ];
}

/** Locally administered, different for different names. */
function defaultMac(hostname: string, n: number): string {
  let sum = 0;
  for (const byte of Buffer.from(hostname)) sum = (sum * 31 + byte) % 0xffff;
  return ['52', '54', '00', hex(sum >> 8), hex(sum & 255), hex(n)].join(':');
}

const hex = (value: number): string => value.toString(16).padStart(2, '0');
