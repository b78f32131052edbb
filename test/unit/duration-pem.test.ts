/** What proxy and controller both read: durations, and certificates in PEM text. */
import { execFileSync } from 'node:child_process';
import { X509Certificate } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { parseTtl } from '../../src/controller/settings.ts';
import { parseDuration } from '../../src/mesh/duration.ts';
import { splitPem } from '../../src/mesh/pem.ts';

describe('a duration', () => {
  it('is one or several numbers with units, or seconds', () => {
    const all: Readonly<Record<string, number>> = {
      '250ms': 250,
      '30': 30_000,
      '30s': 30_000,
      '1h30m': 5_400_000,
      '1d': 86_400_000,
    };
    for (const [text, ms] of Object.entries(all)) expect(parseDuration(text), text).toBe(ms);
    for (const bad of [
      '',
      ' 1s',
      '1 s',
      '1.5h',
      '-1s',
      '+1s',
      '0',
      '0s',
      '1x',
      's',
      '1H',
      '11y',
      '3651d',
      '1e3',
      '٣s',
    ]) {
      expect(() => parseDuration(bad), bad).toThrow(/expected a duration/);
    }
  });

  it('of certificates has whole seconds and a limit', () => {
    expect(['30s', '10m', '24h', '1d', '90d', '1h30m', '3600'].map(parseTtl)).toEqual([
      30, 600, 86_400, 86_400, 7_776_000, 5400, 3600,
    ]);
    for (const bad of ['0s', '500ms', '1500ms', '91d', '', 'x', '1s1']) {
      expect(() => parseTtl(bad), bad).toThrow(`--ttl ${JSON.stringify(bad)}: expected a duration of whole seconds`);
    }
  });
});

describe('PEM text', () => {
  const make = (name: string): string =>
    execFileSync(
      'openssl',
      `req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout /dev/null -subj /CN=${name}`.split(' '),
      { encoding: 'utf8', stdio: 'pipe' },
    ).trim();
  const [one, other] = [make('one'), make('other')];
  const subjects = (text: string): string[] => splitPem(text).map((pem) => new X509Certificate(pem).subject);

  it('is split into its certificates, in order, whatever is around them', () => {
    expect(splitPem(`${one}\n${other}\n`)).toEqual([one, other]);
    expect(subjects(`${other}${one}`)).toEqual(['CN=other', 'CN=one']);
    expect(subjects(`# a root\n${one}\r\nsubject: CN = one -- really\n${other.replaceAll('\n', '\r\n')}`)).toEqual([
      'CN=one',
      'CN=other',
    ]);
    const key = '-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----';
    expect(splitPem(`${key}\n${one}`)).toEqual([one]);
    for (const none of ['', 'nonsense', key, '-----BEGIN CERTIFICATE-----\nAAAA']) expect(splitPem(none)).toEqual([]);
  });

  it('of which a certificate was cut off is not taken for one without it', () => {
    const cut = one.slice(0, one.length / 2);
    const blocks = splitPem(`${cut}\n${other}`);
    // The reader of the blocks refuses it: a root that is lost in silence would be missed much later.
    expect(blocks).toHaveLength(1);
    expect(() => new X509Certificate(blocks[0] ?? '')).toThrow();
  });
});
