/** Where the proxy's log lines go: gathered and written by few system calls, in a bounded buffer, none lost at a clean exit. */
import { write, writeSync } from 'node:fs';

/** Beyond this much, lines are dropped and counted: whoever reads the log has stopped reading. */
const MAX_BUFFERED_BYTES = 8 << 20;
const RETRY_MS = 20;
/** How long an exit may wait for a reader of the log. */
const EXIT_MS = 500;

const isTemporary = (error: NodeJS.ErrnoException): boolean => error.code === 'EAGAIN' || error.code === 'EINTR';

/** A pino destination over a file descriptor. */
export class LogStream {
  readonly #fd: number;
  #lines: string[] = [];
  #characters = 0;
  /** Being written; a part of it may be written already. */
  #current = Buffer.alloc(0);
  #writing = false;
  #scheduled = false;
  /** Lines that were dropped. */
  dropped = 0;

  constructor(fd: number) {
    this.#fd = fd;
  }

  /** Takes one line, or so many in one text. */
  write(text: string, lines = 1): void {
    if (this.#characters + this.#current.length > MAX_BUFFERED_BYTES) {
      this.dropped += lines;
      return;
    }
    this.#lines.push(text);
    this.#characters += text.length;
    if (this.#scheduled || this.#writing) return;
    // All lines of this turn of the event loop go in one write.
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      this.#next();
    });
  }

  /** Writes what is left, now: at exit. */
  flushSync(): void {
    // A write that is under way may or may not have happened; nothing is known of it, so it is not repeated.
    if (!this.#writing) this.#take();
    else this.#current = Buffer.from(this.#lines.join(''));
    this.#lines = [];
    const deadline = Date.now() + EXIT_MS;
    while (this.#current.length > 0 && Date.now() < deadline) {
      try {
        this.#current = this.#current.subarray(writeSync(this.#fd, this.#current));
      } catch (error) {
        if (!isTemporary(error as NodeJS.ErrnoException)) break;
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, RETRY_MS);
      }
    }
    this.#current = Buffer.alloc(0);
  }

  #take(): void {
    if (this.#lines.length > 0) {
      this.#current = Buffer.concat([this.#current, Buffer.from(this.#lines.join(''))]);
      this.#lines = [];
      this.#characters = 0;
    }
  }

  #next(): void {
    if (this.#writing) return;
    this.#take();
    if (this.#current.length === 0) return;
    this.#writing = true;
    write(this.#fd, this.#current, (error, written) => {
      this.#writing = false;
      if (error === null) {
        this.#current = this.#current.subarray(written);
        this.#next();
      } else if (isTemporary(error)) setTimeout(() => this.#next(), RETRY_MS).unref();
      else {
        // Nobody is there to read (EPIPE), or the disk is full: there is nowhere to say so.
        this.dropped++;
        this.#current = Buffer.alloc(0);
        this.#next();
      }
    });
  }
}
