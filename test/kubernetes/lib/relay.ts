/** A TCP relay between a client and a server that a test can make silent, slow or broken. */
import { createServer, connect as dial, type Server, type Socket } from 'node:net';

/** What the relay does with bytes. */
export type RelayMode = 'pass' | 'stall';

export class Relay {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #targetPort: number;
  #mode: RelayMode = 'pass';

  private constructor(targetPort: number) {
    this.#targetPort = targetPort;
    this.#server = createServer((client) => this.#serve(client));
  }

  /** @param targetPort on 127.0.0.1 */
  static async start(targetPort: number): Promise<Relay> {
    const relay = new Relay(targetPort);
    await new Promise<void>((resolve) => relay.#server.listen(0, '127.0.0.1', resolve));
    return relay;
  }

  get url(): string {
    const address = this.#server.address();
    return `https://127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`;
  }

  get connections(): number {
    return this.#sockets.size / 2;
  }

  /** `stall`: connections stay open, also new ones, and no byte goes on in either direction. */
  set mode(mode: RelayMode) {
    this.#mode = mode;
    for (const socket of this.#sockets) {
      if (mode === 'stall') socket.pause();
      else socket.resume();
    }
  }

  /** Cuts all connections, politely (FIN) or not (RST). */
  cut(how: 'fin' | 'reset' = 'reset'): void {
    for (const socket of this.#sockets) {
      if (how === 'fin') socket.destroy();
      else socket.resetAndDestroy();
    }
  }

  /** Cuts those connections that were open when the relay stalled: they are never heard of again. */
  async close(): Promise<void> {
    this.cut();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  #serve(client: Socket): void {
    const server = dial(this.#targetPort, '127.0.0.1');
    for (const [from, to] of [
      [client, server],
      [server, client],
    ] as const) {
      this.#sockets.add(from);
      from.on('data', (chunk: Buffer) => void to.write(chunk));
      from.on('end', () => to.end());
      from.on('error', () => to.destroy());
      from.on('close', () => {
        this.#sockets.delete(from);
        to.destroy();
      });
      if (this.#mode === 'stall') from.pause();
    }
  }
}
