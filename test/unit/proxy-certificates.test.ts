import { execFileSync } from 'node:child_process';
import { createPrivateKey, createPublicKey, X509Certificate } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { grantedTtl } from '../../src/controller/authority.ts';
import { publicKeyOfRequest } from '../../src/controller/csr.ts';
import { parseIdentity } from '../../src/mesh/identity.ts';
import { AuthorityClient, type CertificateSource } from '../../src/proxy/certificates/authority-client.ts';
import { type CheckedCertificate, checkCertificate } from '../../src/proxy/certificates/check.ts';
import { makeCsr, newKey } from '../../src/proxy/certificates/csr.ts';
import { CertificateManager } from '../../src/proxy/certificates/manager.ts';
import type { CertificateBundle } from '../../src/proxy/engine.ts';
import { Peer, silent, until } from './proxy-peer.ts';

const A = 'spiffe://cluster.local/ns/n/sa/a';
const B = 'spiffe://cluster.local/ns/n/sa/b';
let peer: Peer;
let ttl = 3600;
let asked: { identity: string; token: unknown; validity: number }[];

/** Signs what it is asked for, as the controller's certificate authority does. */
function serve(): void {
  peer.onCertificate = (call, callback) => {
    const uri = call.request.metadata?.fields?.['ImpersonatedIdentity']?.stringValue ?? '';
    const validity = Number(String(call.request.validityDuration));
    asked.push({ identity: uri, token: call.metadata.get('authorization')[0], validity });
    const identity = parseIdentity(uri);
    if (identity === undefined) throw new Error(`bad identity ${uri}`);
    publicKeyOfRequest(call.request.csr)
      .then((key) => peer.authority.signWorkload(identity, key, grantedTtl(validity, ttl)))
      .then(
        ({ chain }) => callback(null, { certChain: [...chain] }),
        (error: Error) => callback({ code: 13, details: error.message }),
      );
  };
}

beforeEach(async () => {
  peer = await Peer.start();
  asked = [];
  ttl = 3600;
  serve();
});
afterEach(() => peer.stop());

describe('certificate signing request', () => {
  it('is a PKCS#10 that OpenSSL verifies: P-256, empty subject, one critical URI', async () => {
    const pem = makeCsr(A, await newKey());
    const text = execFileSync('openssl', ['req', '-noout', '-text', '-verify'], {
      input: pem,
      stdio: 'pipe',
    }).toString();
    expect(text).toMatch(/Subject: *\n/);
    expect(text).toContain('NIST CURVE: P-256');
    expect(text).toContain('ecdsa-with-SHA256');
    expect(text).toMatch(new RegExp(`X509v3 Subject Alternative Name: critical\\s+URI:${A}\\s`));
  });

  it('refuses an identity that is not ASCII', async () => {
    const keys = await newKey();
    expect(() => makeCsr('spiffe://ü/ns/a/sa/b', keys)).toThrow(/not ASCII/);
  });

  it('holds long names', async () => {
    const long = `spiffe://cluster.local/ns/${'n'.repeat(300)}/sa/${'s'.repeat(300)}`;
    const text = execFileSync('openssl', ['req', '-noout', '-text', '-verify'], {
      input: makeCsr(long, await newKey()),
      stdio: 'pipe',
    }).toString();
    expect(text).toContain(long);
  });
});

describe('call to the certificate authority', () => {
  it('gets a certificate of a key that is new each time, impersonating, with the token as it is now', async () => {
    const client = new AuthorityClient(peer.settings(), 600);
    const first = await client.fetch(A);
    writeFileSync(join(peer.directory, 'token'), 'second');
    const second = await client.fetch(A);
    expect(asked).toEqual([
      { identity: A, token: 'Bearer first-token', validity: 600 },
      { identity: A, token: 'Bearer second', validity: 600 },
    ]);
    expect(first.bundle.keyPem).not.toBe(second.bundle.keyPem);
    const leaf = new X509Certificate(first.bundle.chainPem);
    expect(leaf.subjectAltName).toBe(`URI:${A}`);
    expect(leaf.checkPrivateKey(createPrivateKey(first.bundle.keyPem))).toBe(true);
    expect(createPublicKey(first.bundle.keyPem).asymmetricKeyDetails?.namedCurve).toBe('prime256v1');
    expect(first.bundle.rootsPem).toContain('BEGIN CERTIFICATE');
    client.close();
  });

  it('refuses what is not what was asked for', async () => {
    const keys = await newKey();
    const key = await publicKeyOfRequest(makeCsr(A, keys));
    const identity = parseIdentity(A) as NonNullable<ReturnType<typeof parseIdentity>>;
    const { chain } = await peer.authority.signWorkload(identity, key, 60);
    const other = await Peer.start();
    const now = Date.now();
    const [leaf = '', root = ''] = chain;
    const check = (elements: readonly string[], uri = A, privateKey = keys.privateKey, at = now): CheckedCertificate =>
      checkCertificate(uri, elements, privateKey, { wallMs: at });
    expect(check(chain).notAfterMs).toBeGreaterThan(now);
    expect(check([leaf, `${other.authority.bundle}${root}`]).roots).toHaveLength(2);
    expect(() => check([])).toThrow(/holds 0 certificates/);
    expect(() => check([leaf])).toThrow(/holds 1 certificates/);
    expect(() => check(chain, B)).toThrow(/is of spiffe.*sa\/a.*sa\/b was asked for/);
    expect(() =>
      check(chain, A, createPrivateKey(String(keys.privateKey.export({ type: 'pkcs8', format: 'pem' }))), now + 61_000),
    ).toThrow(/ended at/);
    expect(() => check([leaf, other.authority.bundle])).toThrow(/not signed by any of the roots/);
    expect(() => check(['nonsense', root])).toThrow(/holds no PEM/);
    expect(() => check([leaf, '-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----'])).toThrow(
      /cannot be read/,
    );
    const foreign = await newKey();
    expect(() => check(chain, A, foreign.privateKey)).toThrow(/not of the key/);
    other.stop();
  });
});

describe('certificate manager', () => {
  let installed: { identity: string; bundle: CertificateBundle; at: number }[];
  let removed: string[];
  let manager: CertificateManager;
  const make = (source: CertificateSource = new AuthorityClient(peer.settings(), 86_400)): CertificateManager => {
    [installed, removed] = [[], []];
    manager = new CertificateManager({
      source,
      sink: {
        setCertificate: (identity, bundle) => installed.push({ identity, bundle, at: Date.now() }),
        removeCertificate: (identity) => removed.push(identity),
      },
      log: silent,
    });
    return manager;
  };
  afterEach(() => manager.stop());

  it('fetches before first use and forgets an identity with its last pod', async () => {
    make();
    manager.acquire(A, 'pod1');
    manager.acquire(A, 'pod2');
    await until(() => installed.length === 1);
    expect(manager.list()).toMatchObject([{ identity: A, state: 'Available' }]);
    manager.release(A, 'pod1');
    expect(removed).toEqual([]);
    manager.release(A, 'pod2');
    expect(removed).toEqual([A]);
    expect(manager.list()).toEqual([]);
    expect(asked).toHaveLength(1);
  });

  it('renews short certificates in time, again and again, with a new key', async () => {
    ttl = 2;
    make();
    manager.acquire(A, 'pod1');
    await until(() => installed.length >= 4);
    for (const [index, { at, bundle }] of installed.entries()) {
      const former = installed[index - 1];
      if (former === undefined) continue;
      const end = Date.parse(new X509Certificate(former.bundle.chainPem).validTo);
      expect(at).toBeLessThan(end);
      expect(bundle.keyPem).not.toBe(former.bundle.keyPem);
    }
    expect(removed).toEqual([]);
  });

  it('keeps a certificate while the authority is away, drops it at its end, gets a new one when it is back', async () => {
    ttl = 2;
    make();
    manager.acquire(A, 'pod1');
    await until(() => installed.length === 1);
    peer.onCertificate = (_, callback) => callback({ code: 14, details: 'away' });
    await until(() => manager.counters.failed >= 2, 'failed renewals');
    expect(removed).toEqual([]);
    expect(manager.list()).toMatchObject([{ state: 'Available', error: expect.stringContaining('away') as string }]);
    await until(() => removed.length === 1, 'the end of the certificate');
    expect(manager.list()).toMatchObject([{ state: 'Unavailable' }]);
    serve();
    await until(() => installed.length === 2, 'a new certificate', 15_000);
    expect(manager.list()).toMatchObject([{ state: 'Available' }]);
  });

  it('hands on new roots with the next certificate', async () => {
    ttl = 2;
    make();
    manager.acquire(A, 'pod1');
    await until(() => installed.length === 1);
    const other = await Peer.start();
    const sign = peer.onCertificate;
    peer.onCertificate = (call, callback) =>
      sign(call, (error, answer) => {
        const chain = answer?.certChain ?? [];
        callback(error, { certChain: [...chain.slice(0, -1), `${chain.at(-1) ?? ''}${other.authority.bundle}`] });
      });
    await until(() => installed.length === 2);
    const count = (index: number): number => installed[index]?.bundle.rootsPem.split('BEGIN').length ?? 0;
    expect(count(1)).toBe(count(0) + 1);
    other.stop();
  });

  it('has at most eight requests in flight and puts first what a connection waits for', async () => {
    const waiting: { identity: string; finish: () => void }[] = [];
    make({
      fetch: (identity) =>
        new Promise((_, reject) => waiting.push({ identity, finish: () => reject(new Error('no')) })),
      close: () => {},
    });
    for (let index = 0; index < 12; index++) manager.acquire(`spiffe://t/ns/n/sa/${index}`, `pod${index}`);
    expect(waiting).toHaveLength(8);
    expect(manager.need('spiffe://t/ns/n/sa/11')).toBe(true);
    expect(manager.need('spiffe://t/ns/n/sa/unknown')).toBe(false);
    waiting[0]?.finish();
    await until(() => waiting.length === 9);
    expect(waiting[8]?.identity).toBe('spiffe://t/ns/n/sa/11');
  });

  it('does not install what arrives after the last pod is gone', async () => {
    make();
    manager.acquire(A, 'pod1');
    manager.release(A, 'pod1');
    await until(() => asked.length === 1);
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(installed).toEqual([]);
  });
});
