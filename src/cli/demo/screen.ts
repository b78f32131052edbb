/** What the demo prints: one line a step, with a tick or a cross, the time it took and what was measured. */

const TICK = '\u2713';
const CROSS = '\u2717';
const FRAMES = ['|', '/', '-', '\\'];
const TITLE_WIDTH = 72;

export class Screen {
  readonly #terminal = process.stdout.isTTY;
  #failed = 0;
  #passed = 0;

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
   */
  async step(title: string, step: () => Promise<string>): Promise<boolean> {
    const started = performance.now();
    const progress = this.#progress(title);
    try {
      const evidence = await step();
      this.#passed++;
      progress.end();
      this.#line(TICK, title, started, [evidence]);
      return true;
    } catch (error) {
      this.#failed++;
      progress.end();
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
