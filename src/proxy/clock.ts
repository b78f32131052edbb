/** The proxy and the time: whether this machine's clock is that of the control plane, and what is to be done when it is set. */
import { type ClockOffset, watchClock } from '../mesh/clock.js';
import { ClockSkew, isRefusedForTime } from '../mesh/clock-skew.js';
import type { Logger } from '../mesh/log.js';
import { askTime, offsetByCertificate } from '../mesh/server-time.js';
import { readRoots } from './control-plane.js';
import type { ControlPlaneSettings } from './settings.js';

export interface ProxyClockOptions {
  readonly log: Logger;
  readonly controller: ControlPlaneSettings;
  /** The wall clock was set, or the machine slept. */
  onJump(): void;
}

/** While a connection fails for the time, the server is asked for its own no more often than this. */
const ASK_MS = 10_000;

export class ProxyClock {
  readonly #options: ProxyClockOptions;
  readonly #skew: ClockSkew;
  readonly #watch: { close(): void };
  #askedAtMs = Number.NEGATIVE_INFINITY;
  #stopped = false;
  #said = '';

  constructor(options: ProxyClockOptions) {
    this.#options = options;
    this.#skew = new ClockSkew(options.log);
    this.#watch = watchClock((jump) => {
      this.#skew.jumped(jump);
      options.onJump();
      void this.#ask(options.controller);
    });
  }

  /** How far this machine's clock is behind that of others, at worst; 0 where they agree or nobody said. Milliseconds. */
  get skewMs(): number {
    return this.#skew.worstMs;
  }

  /** @param of whose clock it is */
  told(of: string, offset: ClockOffset): void {
    this.#skew.told(of, offset);
  }

  /** A call failed. Where it was for the time, the server is asked in a way that does not depend on it. */
  failed(error: Error, server: ControlPlaneSettings): void {
    if (!isRefusedForTime(error.message) || performance.now() - this.#askedAtMs < ASK_MS) return;
    this.#askedAtMs = performance.now();
    void this.#ask(server);
  }

  stop(): void {
    this.#stopped = true;
    this.#watch.close();
  }

  async #ask({ host, port, rootCa, altHostname }: ControlPlaneSettings): Promise<void> {
    try {
      const time = await askTime({ host, port, altHostname, roots: readRoots(rootCa) });
      if (this.#stopped) return;
      this.#said = '';
      const offset = time.offset ?? offsetByCertificate(time, Date.now());
      if (offset !== undefined) this.#skew.told('controller', offset);
      else if (Date.now() >= time.notAfterMs) this.#ended(host, time.notAfterMs);
    } catch (error) {
      // It may just be away, which the log tells elsewhere.
      this.#options.log.debug(
        { event: 'time_not_told', error: (error as Error).message },
        'the controller tells no time',
      );
    }
  }

  /** It says no time: the certificate may really have ended, or the clock here be ahead. */
  #ended(host: string, notAfterMs: number): void {
    if (this.#said === host) return;
    this.#said = host;
    this.#options.log.error(
      {
        event: 'clock_skew_possible',
        server: host,
        notAfter: new Date(notAfterMs).toISOString(),
        hint: 'compare the clocks of this machine and of the control plane; if they agree, renew its certificate',
      },
      'clock skew, or a certificate that was not renewed: by the clock here that of the control plane has ended',
    );
  }
}
