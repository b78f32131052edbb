/** What passes the outside host's interface, as tcpdump sees it. */
import { spawn } from 'node:child_process';

/** A packet as tcpdump told it; `at` is in milliseconds. */
export interface Packet {
  readonly at: number;
  readonly from: string;
  readonly to: string;
  readonly flags: string;
  readonly length: number;
}

/** Everything TCP that passes the outside host's interface. */
export class Wire {
  readonly packets: Packet[] = [];
  readonly #process;
  #said = '';

  private constructor(netns: string) {
    // Short frames and a large buffer: with the default of both there is room for eight packets, and on a busy machine some
    // are not seen.
    const argv = ['-i', 'eth0', '-nn', '-tt', '-l', '-s', '160', '-B', '16384', '--immediate-mode', 'tcp'];
    this.#process = spawn('nsenter', [`--net=/var/run/netns/${netns}`, 'tcpdump', ...argv], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let rest = '';
    this.#process.stdout.setEncoding('utf8').on('data', (text: string) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop() ?? '';
      for (const line of lines.filter((each) => each !== '')) {
        const [, at, from, to, flags, length] =
          line.match(/^(\S+) IP6? (\S+)\.\d+ > (\S+)\.\d+: Flags \[([^\]]*)\].* length (\d+)/) ?? [];
        if (!at || !from || !to || flags === undefined) throw new Error(`tcpdump says ${line}`);
        this.packets.push({ at: Number(at) * 1000, from, to, flags, length: Number(length) });
      }
    });
  }

  /** Throws where packets were missed, for then nothing was shown. */
  async stop(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    const gone = new Promise((resolve) => this.#process.once('exit', resolve));
    this.#process.kill('SIGINT');
    await gone;
    const [, dropped] = /(\d+) packets? dropped by kernel/.exec(this.#said) ?? [];
    if (dropped !== '0') throw new Error(`tcpdump missed packets: ${this.#said}`);
  }

  static async open(netns: string): Promise<Wire> {
    const wire = new Wire(netns);
    await new Promise<void>((resolve, reject) => {
      wire.#process.stderr.on('data', (text: Buffer) => {
        wire.#said += text;
        if (text.includes('listening on')) resolve();
      });
      wire.#process.once('exit', () => reject(new Error('tcpdump ended')));
    });
    return wire;
  }

  /** SYNs, SYN-ACKs and payload of the pods by their addresses, and payload to them, until the moment. */
  clear(pods: readonly string[], until = Number.POSITIVE_INFINITY): Packet[] {
    const own = (address: string): boolean => pods.includes(address);
    return this.packets.filter(
      (each) =>
        each.at < until &&
        ((own(each.from) && /S/.test(each.flags)) || ((own(each.from) || own(each.to)) && each.length > 0)),
    );
  }
}
