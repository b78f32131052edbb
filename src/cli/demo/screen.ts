/** What the demo prints: one line a step, with a tick or a cross, the time it took and what was measured. */

const TICK = '\u2713';
const CROSS = '\u2717';
const FRAMES = ['|', '/', '-', '\\'];
const TITLE_WIDTH = 72;

/** The demo is to stop: a step did not begin, or is left where it stands. */
export class Stopped extends Error {}

export class Screen {
  readonly #terminal = process.stdout.isTTY;
  readonly #stop: AbortSignal;
  readonly #stopped: Promise<never>;
  #work: Promise<unknown> = Promise.resolve();
  #failed = 0;
  #passed = 0;

  /** @param stop ends the steps */
  constructor(stop: AbortSignal) {
    this.#stop = stop;
    this.#stopped = new Promise((_, reject) => stop.addEventListener('abort', () => reject(new Stopped())));
    this.#stopped.catch(() => {});
  }

  get failed(): number {
    return this.#failed;
  }

  get passed(): number {
    return this.#passed;
  }

  say(text: string): void {
    process.stdout.write(`${text}\n`);
  }

  /**
   * Runs a step and prints how it went.
   * @param step returns what was measured, in a few words; its error is the cross's reason
   * @returns whether the step succeeded
   * @throws Stopped once the demo is to stop
   */
  async step(title: string, step: () => Promise<string>): Promise<boolean> {
    if (this.#stop.aborted) throw new Stopped();
    const work = step();
    this.#work = work.catch(() => {});
    return this.#show(title, Promise.race([work, this.#stopped]));
  }

  /** A step that is run although the demo stops: its end. */
  lastStep(title: string, step: () => Promise<string>): Promise<boolean> {
    return this.#show(title, step());
  }

  /** Resolves when nothing of a step that was left goes on. */
  async settled(): Promise<void> {
    await this.#work;
  }

  async #show(title: string, work: Promise<string>): Promise<boolean> {
    const started = performance.now();
    const progress = this.#progress(title);
    try {
      const evidence = await work;
      this.#passed++;
      progress.end();
      this.#line(TICK, title, started, [evidence]);
      return true;
    } catch (error) {
      progress.end();
      if (error instanceof Stopped) throw error;
      this.#failed++;
      const reason = error instanceof Error ? error.message : String(error);
      this.#line(CROSS, title, started, reason.split('\n'));
      return false;
    }
  }

  #line(mark: string, title: string, started: number, details: readonly string[]): void {
    const seconds = ((performance.now() - started) / 1000).toFixed(1).padStart(5);
    this.say(` ${mark} ${title.padEnd(TITLE_WIDTH)} ${seconds} s`);
    for (const detail of details) this.say(`     ${detail}`);
  }

  /** A turning mark on a terminal; elsewhere a line when a step takes long. */
  #progress(title: string): { end: () => void } {
    let ticks = 0;
    const timer = setInterval(() => {
      ticks++;
      if (this.#terminal) process.stdout.write(`\r ${FRAMES[ticks % FRAMES.length]} ${title}`);
      else if (ticks % 25 === 0) this.say(`   ... ${title} (${ticks / 5} s)`);
    }, 200);
    return {
      end: () => {
        clearInterval(timer);
        if (this.#terminal) process.stdout.write('\r\u001b[K');
      },
    };
  }
}
