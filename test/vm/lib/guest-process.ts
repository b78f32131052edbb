/** A command that runs in a guest. */
import { type Frame, FromGuest, ToGuest } from './frames.ts';

/** Output that comes later than this after the end is of processes left behind that have the same pipes: not waited for. */
const LATE_MS = 500;

export class GuestProcess {
  /** Exit code, or 128 + signal number; what the command itself said is complete then. */
  readonly ended: Promise<number>;
  /** No more output can come. */
  readonly closed: Promise<void>;
  stdout = '';
  stderr = '';
  readonly #send: (type: number, payload?: Buffer) => void;
  readonly #onOutput: (text: string) => void;
  readonly #decoders = [new TextDecoder(), new TextDecoder()] as const;
  #resolveEnded: (code: number) => void = () => {};
  #rejectEnded: (error: Error) => void = () => {};
  #resolveClosed: () => void = () => {};
  #waiting: (() => void)[] = [];
  #code: number | undefined;
  #open = 2;

  constructor(send: (type: number, payload?: Buffer) => void, onOutput: (text: string) => void = () => {}) {
    this.#send = send;
    this.#onOutput = onOutput;
    this.ended = new Promise((resolve, reject) => {
      this.#resolveEnded = resolve;
      this.#rejectEnded = reject;
    });
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    // Nobody may be waiting for one that is in the background when its guest is reset.
    this.ended.catch(() => {});
  }

  get running(): boolean {
    return this.#code === undefined;
  }

  /** Writes to standard input. */
  write(data: string | Buffer): void {
    const bytes = Buffer.from(data as string);
    for (let at = 0; at < bytes.length; at += 1 << 20)
      this.#send(ToGuest.input, bytes.subarray(at, Math.min(bytes.length, at + (1 << 20))));
  }

  /** Writes the last of standard input. */
  end(data?: string | Buffer): void {
    if (data !== undefined) this.write(data);
    this.#send(ToGuest.inputEnd);
  }

  /** Sends a signal, by its number, to the command's process group. */
  kill(signal = 15): void {
    const payload = Buffer.alloc(4);
    payload.writeUInt32LE(signal);
    this.#send(ToGuest.signal, payload);
  }

  /** Resolves when standard output has a match. @throws Error when the command ends or the time is over without */
  async said(pattern: RegExp, timeoutMs = 60_000): Promise<RegExpMatchArray> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const match = this.stdout.match(pattern);
      if (match) return match;
      const left = deadline - performance.now();
      if (!this.running || left <= 0) {
        const why = this.running ? `within ${timeoutMs} ms` : `and ended with ${this.#code}`;
        throw new Error(
          `a command did not say ${pattern} ${why}: ${this.stdout.slice(-2000)}${this.stderr.slice(-2000)}`,
        );
      }
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#waiting.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
  }

  /** For the guest. */
  receive({ type, payload }: Frame): void {
    if (type === FromGuest.output) this.stdout += this.#text(0, payload);
    if (type === FromGuest.errors) this.stderr += this.#text(1, payload);
    if (type === FromGuest.outputEnd || type === FromGuest.errorsEnd) this.#open--;
    if (type === FromGuest.exit) {
      const status = payload.readUInt32LE(0);
      const code = (status & 0x7f) === 0 ? (status >> 8) & 0xff : 128 + (status & 0x7f);
      this.#code = code;
      setTimeout(() => this.#resolveEnded(code), LATE_MS).unref();
    }
    if (this.#code !== undefined && this.#open === 0) {
      this.#resolveEnded(this.#code);
      this.#resolveClosed();
    }
    for (const wake of this.#waiting.splice(0)) wake();
  }

  #text(stream: 0 | 1, payload: Buffer): string {
    const text = this.#decoders[stream].decode(payload, { stream: true });
    this.#onOutput(text);
    return text;
  }

  /** For the guest: it is gone. */
  fail(error: Error): void {
    this.#code ??= 128;
    this.#rejectEnded(error);
    this.#resolveClosed();
    for (const wake of this.#waiting.splice(0)) wake();
  }
}
