/** Clocks that jump and differ: what is noticed, what is said, and what certificates do meanwhile. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { clockFinding } from '../../src/cli/check/clock.ts';
import { publicKeyOfRequest } from '../../src/controller/csr.ts';
import { type Clock, type ClockJump, offsetByDate, roughly, watchClock } from '../../src/mesh/clock.ts';
import { ClockSkew, isRefusedForTime, isSkewed } from '../../src/mesh/clock-skew.ts';
import { createLogger } from '../../src/mesh/log.ts';
import { askTime, offsetByCertificate } from '../../src/mesh/server-time.ts';
import { type CheckedCertificate, ClockSkewError, checkCertificate } from '../../src/proxy/certificates/check.ts';
import { makeCsr, newKey } from '../../src/proxy/certificates/csr.ts';
import { CertificateManager } from '../../src/proxy/certificates/manager.ts';
import { timeHint } from '../../src/proxy/token-times.ts';
import { Peer } from './proxy-peer.ts';

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const START = Date.UTC(2026, 10, 27, 12);

/** Goes on with vitest's timers; the wall clock is set by hand. */
class TestClock implements Clock {
  offset = 0;
  slept = 0;
  readonly #start = performance.now();
  wallMs = (): number => START + this.timerMs() + this.slept + this.offset;
  elapsedMs = (): number => 5000 + this.timerMs() + this.slept;
  timerMs = (): number => performance.now() - this.#start;
}

beforeEach(() =>
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval', 'performance', 'Date'] }),
);
afterEach(() => vi.useRealTimers());

describe('the watch of the clock', () => {
  it('tells jumps forward, back, and sleep, each once, and nothing of a clock that is slewed', async () => {
    const clock = new TestClock();
    const jumps: ClockJump[] = [];
    const watch = watchClock((jump) => jumps.push(jump), clock);
    for (let second = 0; second < 600; second++) {
      clock.offset += 0.5;
      await vi.advanceTimersByTimeAsync(1000);
    }
    expect(jumps).toEqual([]);
    clock.offset += DAY;
    await vi.advanceTimersByTimeAsync(10_000);
    clock.offset -= 2 * DAY;
    await vi.advanceTimersByTimeAsync(10_000);
    clock.slept += HOUR;
    await vi.advanceTimersByTimeAsync(10_000);
    expect(jumps.map(({ setByMs, sleptMs }) => [setByMs, sleptMs])).toEqual([
      [DAY, 0],
      [-2 * DAY, 0],
      [0, HOUR],
    ]);
    watch.close();
  });
});

describe('the offset by a Date', () => {
  const at = (wallMs: number, elapsedMs = wallMs): { wallMs: number; elapsedMs: number } => ({ wallMs, elapsedMs });
  const date = new Date(START).toUTCString();
  it('holds the true one, whatever the way took', () => {
    for (const way of [0, 300, 4000]) {
      for (const skew of [-DAY, -130_000, 0, 700, 130_000]) {
        // The server answers in the middle of the way, somewhere within the second that it tells.
        for (const within of [0, 999]) {
          const local = START + within - skew;
          const told = offsetByDate(date, at(local - way / 2), at(local + way / 2));
          expect(Math.abs((told?.offsetMs ?? Number.NaN) - skew)).toBeLessThanOrEqual(told?.uncertaintyMs ?? 0);
          expect(told?.uncertaintyMs).toBe(500 + way / 2);
        }
      }
    }
  });

  it('is none without a date, or where the clock was set meanwhile', () => {
    expect(offsetByDate(undefined, at(START), at(START))).toBeUndefined();
    expect(offsetByDate('yesterday', at(START), at(START))).toBeUndefined();
    expect(offsetByDate(date, at(START, 0), at(START + HOUR, 10))).toBeUndefined();
  });

  it('is a skew only beyond all doubt', () => {
    expect(isSkewed({ offsetMs: 6000, uncertaintyMs: 500 })).toBe(true);
    expect(isSkewed({ offsetMs: -6000, uncertaintyMs: 1500 })).toBe(false);
    expect([1200, 130_000, 3_000_000, DAY, 9 * DAY].map(roughly)).toEqual(['1 s', '130 s', '50 min', '24 h', '9 days']);
  });
});

describe('what is said of a skew', () => {
  it('is said when it begins, changes and ends, and again every ten minutes', async () => {
    const lines: { event: string; level: string; msg: string }[] = [];
    const log = createLogger('test', { write: (line: string) => void lines.push(JSON.parse(line)) });
    const clock = new TestClock();
    const skew = new ClockSkew(log, clock);
    const told = (offsetMs: number): void => skew.told('controller', { offsetMs, uncertaintyMs: 500 });
    for (const offset of [0, 400, 130_000, 130_400, 129_800]) told(offset);
    expect(lines.map(({ level, msg }) => `${level} ${msg}`)).toEqual([
      'error clock skew: this machine is 130 s behind, by the clock of the controller',
    ]);
    expect(skew.worstMs).toBe(129_800);
    await vi.advanceTimersByTimeAsync(600_000);
    told(130_000);
    told(-8000);
    told(0);
    told(0);
    expect(lines.slice(1).map(({ level, msg }) => `${level} ${msg}`)).toEqual([
      'error clock skew: this machine is 130 s behind, by the clock of the controller',
      'warn clock skew: this machine is 8 s ahead, by the clock of the controller',
      'info no clock skew any more: this machine and the controller agree',
    ]);
    expect(skew.worstMs).toBe(0);
  });

  it('is a finding', () => {
    const one = (offsetMs: number, uncertaintyMs = 500): string => {
      const { result, seen } = clockFinding([{ of: 'the controller', offset: { offsetMs, uncertaintyMs } }]);
      return `${result} ${seen}`;
    };
    expect(one(0)).toMatch(/^ok/);
    expect(one(-DAY)).toBe('failed clock skew: this machine is 24 h ahead of the controller (to 1 s)');
    expect(one(120_000)).toBe('failed clock skew: this machine is 120 s behind the controller (to 1 s)');
    expect(one(20_000)).toMatch(/^warning/);
    expect(clockFinding([]).result).toBe('not tried');
  });
});

describe('certificates', () => {
  const identity = { trustDomain: 'cluster.local', namespace: 'n', serviceAccount: 'a' };
  const uri = 'spiffe://cluster.local/ns/n/sa/a';
  let clock: TestClock;
  let authority: number;
  let installed: CheckedCertificate['notBeforeMs'][];
  let removed: number;
  let asked: number;
  let away: boolean;
  let manager: CertificateManager;
  let events: string[];

  /** An authority with a clock of its own, whose certificates are real in their dates only. */
  const sign = (): CheckedCertificate => {
    asked++;
    if (away) throw new Error('14 UNAVAILABLE: certificate has expired');
    const signedMs = authority + clock.elapsedMs();
    const [notBeforeMs, notAfterMs] = [signedMs - 120_000, signedMs + DAY];
    if (clock.wallMs() >= notAfterMs) throw new ClockSkewError('clock skew');
    const bundle = { chainPem: String(notBeforeMs), keyPem: '', rootsPem: '' };
    return { bundle, chain: [], roots: [], notBeforeMs, notAfterMs, remainingMs: DAY };
  };

  beforeEach(() => {
    clock = new TestClock();
    authority = START - 5000;
    [installed, events, removed, asked, away] = [[], [], 0, 0, false];
    const log = createLogger('test', { write: (line: string) => void events.push(JSON.parse(line).event) });
    manager = new CertificateManager({
      source: { fetch: async () => sign(), close: () => {} },
      sink: {
        setCertificate: (_, { chainPem }) => installed.push(Number(chainPem)),
        removeCertificate: () => removed++,
      },
      log,
      clock,
      random: () => 0.5,
    });
    manager.acquire(uri, 'pod');
  });
  afterEach(() => manager.stop());
  /** The wall clock is set, which the watch tells. */
  const set = (offset: number): void => {
    clock.offset = offset;
    manager.clockJumped();
  };

  it('are renewed in time while the clock jumps to and fro by days, and none is asked for all the time', async () => {
    for (let hour = 0; hour < 72; hour++) {
      await vi.advanceTimersByTimeAsync(HOUR);
      if (hour % 7 === 3) set([DAY, -DAY, 0, 40 * DAY][(hour / 7) & 3] ?? 0);
    }
    expect(removed).toBe(0);
    expect(installed.length).toBeGreaterThanOrEqual(6);
    // Twice a day, and after each jump now and then.
    expect(asked).toBeLessThan(72 * 60 + 100);
    const state = manager.list()[0]?.state;
    expect(state).toBe('Available');
  });

  it('end when they do by the authority’s clock, also when the clock here is set back', async () => {
    await vi.advanceTimersByTimeAsync(HOUR);
    away = true;
    set(-3 * DAY);
    expect(events).toContain('certificate_out_of_time');
    await vi.advanceTimersByTimeAsync(22 * HOUR);
    expect(removed).toBe(0);
    await vi.advanceTimersByTimeAsync(2 * HOUR);
    expect(removed).toBe(1);
    expect(events).toContain('certificate_expired');
    // Every 15 s at most, once it is gone and before.
    expect(asked).toBeLessThan((25 * HOUR) / 5000);
    away = false;
    set(0);
    await vi.advanceTimersByTimeAsync(1000);
    expect(manager.list()[0]?.state).toBe('Available');
  });

  it('stay in use while the clock is ahead by mistake, which is said, and are tried again when it is set right', async () => {
    await vi.advanceTimersByTimeAsync(HOUR);
    away = true;
    set(2 * DAY);
    expect(events).toContain('certificate_out_of_time');
    await vi.advanceTimersByTimeAsync(HOUR);
    expect([removed, manager.list()[0]?.state]).toEqual([0, 'Available']);
    const before = asked;
    away = false;
    set(0);
    await vi.advanceTimersByTimeAsync(100);
    expect([asked - before, installed.length]).toEqual([1, 2]);
  });

  it('are renewed at once after a sleep that took more than half of their life', async () => {
    await vi.advanceTimersByTimeAsync(HOUR);
    clock.slept += 15 * HOUR;
    manager.clockJumped();
    await vi.advanceTimersByTimeAsync(100);
    expect([installed.length, removed]).toEqual([2, 0]);
    clock.slept += 30 * HOUR;
    manager.clockJumped();
    expect(removed).toBe(1);
    await vi.advanceTimersByTimeAsync(1000);
    expect(installed.length).toBe(3);
  });

  it('of an authority a day ahead do not replace one that is valid here; without one they are taken, and asked for anew', async () => {
    await vi.advanceTimersByTimeAsync(100);
    expect(installed).toHaveLength(1);
    authority += DAY;
    await vi.advanceTimersByTimeAsync(13 * HOUR);
    expect(installed).toHaveLength(1);
    expect(events).toContain('certificate_failed');
    authority -= DAY;
    await vi.advanceTimersByTimeAsync(2 * 60_000);
    expect(installed).toHaveLength(2);
    authority += DAY;
    manager.acquire('spiffe://cluster.local/ns/n/sa/new', 'pod2');
    await vi.advanceTimersByTimeAsync(100);
    expect(installed).toHaveLength(3);
    authority -= DAY;
    await vi.advanceTimersByTimeAsync(16 * 60_000);
    expect(installed).toHaveLength(4);
    expect(installed[3]).toBeLessThan(clock.wallMs());
  });

  it('of a node three minutes behind are installed, and not asked for more than they need be', async () => {
    set(-180_000);
    await vi.advanceTimersByTimeAsync(DAY * 2);
    expect([removed, manager.list()[0]?.state]).toEqual([0, 'Available']);
    expect(asked).toBeLessThan(7);
  });

  it('fetched by a client that is a day ahead are refused as skewed, whichever clock is believed', async () => {
    vi.useRealTimers();
    const peer = await Peer.start();
    try {
      const keys = await newKey();
      const { chain } = await peer.authority.signWorkload(identity, await publicKeyOfRequest(makeCsr(uri, keys)), 3600);
      const real = Date.now();
      const check = (wallMs: number, offsetMs?: number): CheckedCertificate =>
        checkCertificate(uri, chain, keys.privateKey, {
          wallMs,
          offset: offsetMs === undefined ? undefined : { offsetMs, uncertaintyMs: 500 },
        });
      expect(check(real).remainingMs).toBeGreaterThan(3_590_000);
      expect(() => check(real + DAY, -DAY)).toThrow(ClockSkewError);
      expect(() => check(real + DAY, -DAY)).toThrow(/clock skew: .* this machine is 24 h ahead/);
      // It says no time, as istiod does: a certificate that it signed now cannot have ended.
      expect(() => check(real + DAY)).toThrow(ClockSkewError);
      // The authority itself says that it is over.
      expect(() => check(real + DAY, 0)).toThrow(/also by the clock of the authority/);
      // Behind: how long it lasts is what the authority says, or at most a little more.
      expect(check(real - DAY, DAY).remainingMs / 1000).toBeCloseTo(3600, -2);
      expect(check(real - DAY).remainingMs / 1000).toBeLessThan(3600 + 121);
      expect(check(real - DAY).notBeforeMs).toBeGreaterThan(real - DAY);
    } finally {
      peer.stop();
    }
  });
});

describe('the time of a server', () => {
  it('is learned of one that the roots vouch for, by name, and of no other', async () => {
    vi.useRealTimers();
    const [peer, other] = [await Peer.start(), await Peer.start()];
    try {
      const { host, port, rootCa } = peer.settings();
      const { readFileSync } = await import('node:fs');
      const roots = readFileSync(rootCa, 'utf8');
      const time = await askTime({ host, port, roots });
      expect(Math.abs(time.offset?.offsetMs ?? 9999)).toBeLessThanOrEqual(1500);
      expect(time.notAfterMs).toBeGreaterThan(Date.now());
      await expect(askTime({ host, port, roots: readFileSync(other.settings().rootCa, 'utf8') })).rejects.toThrow(
        /not of a root that is trusted/,
      );
      // Both are of the loopback: another name for it is none of the certificate's.
      await expect(askTime({ host: '127.0.0.2', port, roots })).rejects.toThrow(/127\.0\.0\.2|altnames|ECONNREFUSED/i);
      expect(offsetByCertificate(time, Date.now())).toBeUndefined();
      expect(offsetByCertificate(time, time.notBeforeMs - HOUR)?.offsetMs).toBe(HOUR);
    } finally {
      peer.stop();
      other.stop();
    }
  });

  it('is asked for where OpenSSL refuses for the time, in its own words', () => {
    expect(isRefusedForTime('14 UNAVAILABLE: Last error: Error: certificate is not yet valid.')).toBe(true);
    expect(isRefusedForTime('certificate has expired')).toBe(true);
    expect(isRefusedForTime('self-signed certificate')).toBe(false);
  });
});

describe('a bearer token that was refused', () => {
  const token = (claims: object): string => `h.${Buffer.from(JSON.stringify(claims)).toString('base64url')}.s`;
  it('is told of by its times, where they say something', () => {
    const nowS = START / 1000;
    expect(timeHint(token({ exp: nowS - 60, iat: nowS - 3600 }), START)).toMatch(/ended at .*, or clock skew$/);
    expect(timeHint(token({ exp: nowS + 3600, nbf: nowS + 60 }), START)).toMatch(/not valid before .*: clock skew$/);
    expect(timeHint(token({ exp: nowS + 3600, iat: nowS - 60 }), START)).toBe('');
    for (const none of ['', 'a-node-token', 'a.b.c', 'h.bm90IGpzb24.s', token({ exp: 'soon' })]) {
      expect(timeHint(none, START), none).toBe('');
    }
  });
});
