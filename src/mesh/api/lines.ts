/** Lines of a byte stream: a watch sends one JSON document a line. */

const NEWLINE = 0x0a;

/** Cuts chunks into lines. Bytes of a line that is not whole yet are kept, up to a limit. */
export class LineSplitter {
  readonly #limit: number;
  #kept: Buffer[] = [];
  #size = 0;

  /** @param limit longest line, in bytes */
  constructor(limit: number) {
    this.#limit = limit;
  }

  /** Bytes that wait for the end of their line. */
  get pending(): number {
    return this.#size;
  }

  /**
   * The lines that `chunk` completes, without their ends.
   * @throws Error where a line is longer than the limit
   */
  push(chunk: Buffer): string[] {
    const lines: string[] = [];
    let start = 0;
    for (let end = chunk.indexOf(NEWLINE); end !== -1; end = chunk.indexOf(NEWLINE, start)) {
      const part = chunk.subarray(start, end);
      lines.push((this.#kept.length === 0 ? part : Buffer.concat([...this.#kept, part])).toString('utf8'));
      this.#kept = [];
      this.#size = 0;
      start = end + 1;
    }
    if (start < chunk.length) {
      this.#kept.push(chunk.subarray(start));
      this.#size += chunk.length - start;
      if (this.#size > this.#limit) throw new Error(`a line is longer than ${this.#limit} bytes`);
    }
    return lines;
  }
}
