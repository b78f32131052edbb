/** The frames that host and guest exchange over the virtio port; the guest's side is guest/serve.c. */

/** What the host sends. */
export const ToGuest = { run: 1, input: 2, inputEnd: 3, signal: 4 } as const;
/** What the guest sends. */
export const FromGuest = { hello: 1, output: 2, errors: 3, outputEnd: 4, errorsEnd: 5, exit: 6 } as const;

const HEADER = 12;
/** Beginning of what a guest says at each boot, followed by sixteen random bytes. */
const MARK = Buffer.from('ebb-guest-begin\n');
const GREETING = MARK.length + 16;

export interface Frame {
  readonly id: number;
  readonly type: number;
  readonly payload: Buffer;
}

/** Bytes of a frame. */
export function encodeFrame(id: number, type: number, payload: Buffer = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(HEADER);
  header.writeUInt32LE(id, 0);
  header.writeUInt32LE(type, 4);
  header.writeUInt32LE(payload.length, 8);
  return Buffer.concat([header, payload]);
}

/** Payload of {@link ToGuest.run}: the directory, the environment and the arguments, each ended by NUL. */
export function encodeCommand(
  argv: readonly string[],
  directory: string,
  env: Readonly<Record<string, string>>,
): Buffer {
  const variables = Object.entries(env).map(([name, value]) => `${name}=${value}`);
  const words = [directory, `${variables.length}`, ...variables, ...argv];
  const bad = words.find((word) => word.includes('\0'));
  if (bad !== undefined) throw new Error(`a NUL byte in ${JSON.stringify(bad)}`);
  return Buffer.from(words.map((word) => `${word}\0`).join(''));
}

/** Cuts what a guest sends into frames; until the guest has greeted, everything else is skipped. */
export class FrameReader {
  #buffer = Buffer.alloc(0);
  #greeted = false;

  /** Waits for the greeting of the next boot; what is left of this one is skipped. */
  restart(): void {
    this.#greeted = false;
  }

  /** @returns frames, and the greeting that the guest wants to have back, if it is new. */
  push(chunk: Buffer): { readonly frames: Frame[]; readonly greeting?: Buffer } {
    this.#buffer = Buffer.concat([this.#buffer, chunk]);
    let greeting: Buffer | undefined;
    if (!this.#greeted) {
      const at = this.#buffer.indexOf(MARK);
      if (at < 0) {
        this.#buffer = this.#buffer.subarray(Math.max(0, this.#buffer.length - MARK.length + 1));
        return { frames: [] };
      }
      if (this.#buffer.length < at + GREETING) return { frames: [] };
      greeting = Buffer.from(this.#buffer.subarray(at, at + GREETING));
      this.#buffer = this.#buffer.subarray(at + GREETING);
      this.#greeted = true;
    }
    const frames: Frame[] = [];
    while (this.#buffer.length >= HEADER) {
      const length = this.#buffer.readUInt32LE(8);
      if (this.#buffer.length < HEADER + length) break;
      const [id, type] = [this.#buffer.readUInt32LE(0), this.#buffer.readUInt32LE(4)];
      const payload = this.#buffer.subarray(HEADER, HEADER + length);
      this.#buffer = this.#buffer.subarray(HEADER + length);
      // A greeting that was said again before the answer came.
      if (type !== FromGuest.hello) frames.push({ id, type, payload: Buffer.from(payload) });
    }
    return greeting === undefined ? { frames } : { frames, greeting };
  }
}
