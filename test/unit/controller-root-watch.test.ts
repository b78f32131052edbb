/** The watch over the root files: what it takes, what it refuses, and what it warns of. */
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadRoot, type Root } from '../../src/controller/root.ts';
import { watchRoot } from '../../src/controller/root-watch.ts';
import type { Logger } from '../../src/mesh/log.ts';

const TTL_SECONDS = 2;

describe('root watch', () => {
  let data: string;
  let events: Record<string, unknown>[];
  let taken: Root[];
  let first: string;
  let watch: { close(): void };
  beforeEach(async () => {
    data = mkdtempSync(join(tmpdir(), 'root-watch-'));
    chmodSync(data, 0o700);
    const root = await loadRoot(data);
    first = root.bundle;
    events = [];
    taken = [];
    const record = (fields: Record<string, unknown>) => void events.push(fields);
    const log = { info: record, warn: record, error: record } as unknown as Logger;
    watch = watchRoot({
      directory: data,
      root,
      log,
      ttlSeconds: TTL_SECONDS,
      changed: (next) => void taken.push(next),
    });
  });
  afterEach(() => {
    watch.close();
    rmSync(data, { recursive: true });
  });

  const put = (name: string, content: string) => {
    const staged = join(data, `${name}.new`);
    writeFileSync(staged, content, { mode: 0o600 });
    renameSync(staged, join(data, name));
  };
  /** Resolves with the event once it is logged; fails after five seconds. */
  const event = async (name: string): Promise<Record<string, unknown>> => {
    const until = performance.now() + 5000;
    for (;;) {
      const found = events.find((fields) => fields['event'] === name);
      if (found !== undefined) return found;
      if (performance.now() > until) throw new Error(`no ${name}: ${JSON.stringify(events)}`);
      await sleep(20);
    }
  };

  it('says nothing of files that are as they were, also when they are written again', async () => {
    put('root-cert.pem', first);
    await sleep(1800);
    expect(events).toEqual([]);
    expect(taken).toEqual([]);
  });

  it('takes a root that is added, and the switch of the key once everybody knows the root', async () => {
    const next = makeRoot(data);
    put('root-cert.pem', `${first}${next.certificate}`);
    const added = await event('root_changed');
    expect((added['added'] as string[]).length).toBe(1);
    expect(added['removed']).toEqual([]);
    expect(taken.at(-1)?.bundle.match(/BEGIN/g)?.length).toBe(2);
    await sleep(Date.parse(String(added['settledAt'])) - Date.now() + 10);
    events.length = 0;
    put('root-key.pem', next.key);
    expect((await event('root_changed'))['signing']).not.toBe(added['signing']);
    expect(taken.at(-1)?.certificate.toString('pem')).toBe(next.certificate.trim());
    expect(events.map((fields) => fields['event'])).toEqual(['root_changed']);
  });

  it('warns of a step that comes before the one before it has settled', async () => {
    const next = makeRoot(data);
    put('root-cert.pem', `${first}${next.certificate}`);
    await event('root_changed');
    put('root-key.pem', next.key);
    await event('root_change_abrupt');
    expect(taken.length).toBe(2);
  });

  it('refuses files that are gone, and takes them when they are back', async () => {
    const next = makeRoot(data);
    rmSync(join(data, 'root-cert.pem'));
    expect(String((await event('root_refused'))['reason'])).toContain('ENOENT');
    put('root-cert.pem', `${first}${next.certificate}`);
    await event('root_changed');
    expect(events.filter((fields) => fields['event'] === 'root_refused').length).toBe(1);
  });

  it('refuses a signing root whose time has not come or is over', async () => {
    for (const [madeAt, reason] of [
      ['2099-01-01', /not valid before 2098-12-31/],
      ['2010-01-01', /expired at 2019-12-30/],
    ] as const) {
      events.length = 0;
      const other = join(data, madeAt);
      await loadRoot(other, new Date(madeAt));
      put('root-cert.pem', readFileSync(join(other, 'root-cert.pem'), 'utf8'));
      put('root-key.pem', readFileSync(join(other, 'root-key.pem'), 'utf8'));
      const until = performance.now() + 5000;
      const reasons = () => events.map((fields) => String(fields['reason'])).join('; ');
      while (!reason.test(reasons()) && performance.now() < until) await sleep(20);
      expect(reasons()).toMatch(reason);
    }
    expect(taken).toEqual([]);
  });
});

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function makeRoot(directory: string): { key: string; certificate: string } {
  const [key, certificate] = [join(directory, 'made-key.pem'), join(directory, 'made-cert.pem')];
  const fixed = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-noenc', '-subj', '/CN=made'];
  execFileSync('openssl', [...fixed, '-keyout', key, '-out', certificate, '-days', '10'], { stdio: 'pipe' });
  return { key: readFileSync(key, 'utf8'), certificate: readFileSync(certificate, 'utf8') };
}
