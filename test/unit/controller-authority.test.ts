/** The certificate authority by the judgement of OpenSSL, and its files. */
import { execFileSync } from 'node:child_process';
import { X509Certificate } from 'node:crypto';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createAuthority, grantedTtl, validity } from '../../src/controller/authority.ts';
import { publicKeyOfRequest } from '../../src/controller/csr.ts';
import { loadRoot } from '../../src/controller/root.ts';
import { NodeTokens } from '../../src/controller/tokens.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebE-ca-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

const openssl = (...args: string[]): string => execFileSync('openssl', args, { encoding: 'utf8', stdio: 'pipe' });
const request = (...key: string[]): string => {
  openssl(
    'req',
    '-new',
    '-newkey',
    ...key,
    '-nodes',
    '-subj',
    '/',
    '-keyout',
    join(directory, 'k'),
    '-out',
    join(directory, 'csr'),
  );
  return readFileSync(join(directory, 'csr'), 'utf8');
};
const P256 = ['ec', '-pkeyopt', 'ec_paramgen_curve:P-256'];
const identity = { trustDomain: 'cluster.local', namespace: 'shop', serviceAccount: 'web' };

describe('workload certificates', () => {
  test.each([
    ['P-256', P256],
    ['P-384', ['ec', '-pkeyopt', 'ec_paramgen_curve:P-384']],
    ['RSA 2048', ['rsa:2048']],
  ])('verify with OpenSSL as client and server: %s', async (_name, key) => {
    const root = await loadRoot(join(directory, 'data'));
    const publicKey = await publicKeyOfRequest(request(...key));
    const signed = await createAuthority(root).signWorkload(identity, publicKey, 3600);
    expect(signed.chain).toHaveLength(2);
    writeFileSync(join(directory, 'leaf.pem'), signed.chain[0] ?? '');
    const ca = join(directory, 'data/root-cert.pem');
    for (const purpose of ['sslclient', 'sslserver']) {
      const out = openssl('verify', '-x509_strict', '-purpose', purpose, '-CAfile', ca, join(directory, 'leaf.pem'));
      expect(out).toContain('OK');
    }
    expect(signed.chain[1]).toBe(readFileSync(ca, 'utf8'));
    const text = openssl('x509', '-in', join(directory, 'leaf.pem'), '-noout', '-text');
    expect(text).toMatch(/Subject Alternative Name: critical\s+URI:spiffe:\/\/cluster\.local\/ns\/shop\/sa\/web\n/);
    expect(text).toMatch(/Key Usage: critical\s+Digital Signature, Key Encipherment\n/);
    expect(text).toMatch(/Extended Key Usage:\s+TLS Web Server Authentication, TLS Web Client Authentication\n/);
    expect(text).toMatch(/Basic Constraints: critical\s+CA:FALSE/);
    // The key in the certificate is the requester's.
    expect(openssl('x509', '-in', join(directory, 'leaf.pem'), '-noout', '-pubkey')).toBe(
      openssl('pkey', '-in', join(directory, 'k'), '-pubout'),
    );
  });

  test('names and extensions of the request are not believed', async () => {
    openssl('req', '-new', '-newkey', ...P256, '-nodes', '-subj', '/CN=admin', '-keyout', join(directory, 'k'),
      '-out', join(directory, 'csr'), '-addext', 'subjectAltName=URI:spiffe://cluster.local/ns/kube-system/sa/admin',
      '-addext', 'basicConstraints=critical,CA:TRUE'); // biome-ignore format: one call
    const publicKey = await publicKeyOfRequest(readFileSync(join(directory, 'csr'), 'utf8'));
    const root = await loadRoot(join(directory, 'data'));
    const signed = await createAuthority(root).signWorkload(identity, publicKey, 60);
    const leaf = new X509Certificate(signed.chain[0] ?? '');
    expect(leaf.subjectAltName).toBe('URI:spiffe://cluster.local/ns/shop/sa/web');
    expect(leaf.subject).toBeFalsy();
    expect(leaf.ca).toBe(false);
  });

  test('validity lies within the root and half of it lies ahead, for 24 h as for 1 s', async () => {
    const root = await loadRoot(join(directory, 'data'));
    const now = new Date('2026-11-23T12:00:00Z');
    const early = validity(now, 86_400, root.certificate);
    for (const ttl of [1, 30, 600, 86_400]) {
      const { notBefore, notAfter } = validity(new Date(), ttl, root.certificate);
      expect(notBefore.getTime()).toBeLessThanOrEqual(Date.now());
      expect((notBefore.getTime() + notAfter.getTime()) / 2).toBeGreaterThan(Date.now());
      expect(notAfter.getTime() - Date.now()).toBeLessThanOrEqual(ttl * 1000);
    }
    expect(early.notBefore >= root.certificate.notBefore).toBe(true);
    const late = new Date(root.certificate.notAfter.getTime() - 1000);
    expect(validity(late, 86_400, root.certificate).notAfter).toEqual(root.certificate.notAfter);
  });

  test.each([
    [0, 86_400, 86_400],
    [-5, 86_400, 86_400],
    [Number.NaN, 86_400, 86_400],
    [3600, 86_400, 3600],
    [86_400, 30, 30],
    [1.9, 30, 1],
  ])('a request for %d s under a maximum of %d s gets %d s', (requested, max, granted) => {
    expect(grantedTtl(requested, max)).toBe(granted);
  });
});

describe('requests that are refused', () => {
  test('bad signature', async () => {
    const der = Buffer.from(request(...P256).replace(/-----.*-----|\s/g, ''), 'base64');
    der[der.length - 1] = (der[der.length - 1] ?? 0) ^ 1;
    const pem = `-----BEGIN CERTIFICATE REQUEST-----\n${der.toString('base64')}\n-----END CERTIFICATE REQUEST-----\n`;
    await expect(publicKeyOfRequest(pem)).rejects.toThrow(/signature/);
  });

  test('a changed byte anywhere in what is signed', async () => {
    const der = Buffer.from(request(...P256).replace(/-----.*-----|\s/g, ''), 'base64');
    // SEQUENCE { CertificationRequestInfo SEQUENCE, ... }: both lengths are in the short or one-byte long form here.
    const start = der[1] === 0x81 ? 3 : 2;
    const end = der[start + 1] === 0x81 ? start + 3 + (der[start + 2] ?? 0) : start + 2 + (der[start + 1] ?? 0);
    for (let index = 0; index < end; index++) {
      const changed = Buffer.from(der);
      changed[index] = (changed[index] ?? 0) ^ 0x04;
      const pem = `-----BEGIN CERTIFICATE REQUEST-----\n${changed.toString('base64')}\n-----END CERTIFICATE REQUEST-----\n`;
      await expect(publicKeyOfRequest(pem), `byte ${index} of ${der.length}`).rejects.toThrow();
    }
    expect(end).toBeGreaterThan(90);
  });

  test.each([
    ['empty', ''],
    ['no PEM', 'hello'],
    ['PEM of nothing', '-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n'],
    ['too long', 'A'.repeat(20_000)],
  ])('garbage: %s', async (_name, pem) => {
    await expect(publicKeyOfRequest(pem)).rejects.toThrow(/request/);
  });

  test('two blocks', async () => {
    const pem = request(...P256);
    await expect(publicKeyOfRequest(pem + pem)).rejects.toThrow(/one PEM block/);
  });

  test.each([
    ['RSA 1024', ['rsa:1024'], /1024 bits/],
    ['secp256k1', ['ec', '-pkeyopt', 'ec_paramgen_curve:secp256k1'], /./],
    ['Ed25519', ['ed25519'], /ed25519/],
  ])('weak or odd key: %s', async (_name, key, reason) => {
    await expect(publicKeyOfRequest(request(...key))).rejects.toThrow(reason);
  });
});

describe('the root', () => {
  test('is kept: key 0600, directory 0700, the same after a restart', async () => {
    const data = join(directory, 'data');
    const first = await loadRoot(data);
    const second = await loadRoot(data);
    expect(second.bundle).toBe(first.bundle);
    expect(statSync(data).mode & 0o777).toBe(0o700);
    expect(statSync(join(data, 'root-key.pem')).mode & 0o777).toBe(0o600);
    const out = openssl(
      'verify',
      '-x509_strict',
      '-check_ss_sig',
      '-CAfile',
      join(data, 'root-cert.pem'),
      join(data, 'root-cert.pem'),
    );
    expect(out).toContain('OK');
  });

  test('several roots are all distributed; the one of the key signs', async () => {
    const old = await loadRoot(join(directory, 'old'));
    const data = join(directory, 'data');
    const own = await loadRoot(data);
    writeFileSync(join(data, 'root-cert.pem'), old.bundle + own.bundle);
    const both = await loadRoot(data);
    expect(both.bundle.match(/BEGIN CERTIFICATE/g)).toHaveLength(2);
    expect(both.certificate.serialNumber).toBe(own.certificate.serialNumber);
  });

  test('a start that was cut short after the key is completed', async () => {
    const data = join(directory, 'data');
    await loadRoot(data);
    rmSync(join(data, 'root-cert.pem'));
    expect((await loadRoot(data)).bundle).toContain('BEGIN CERTIFICATE');
  });

  test('is refused: key missing, key of another, readable by others, folder writable by others, garbage', async () => {
    const data = join(directory, 'data');
    await loadRoot(data);
    const key = join(data, 'root-key.pem');
    chmodSync(key, 0o644);
    await expect(loadRoot(data)).rejects.toThrow(/chmod 600/);
    chmodSync(key, 0o600);
    chmodSync(data, 0o777);
    await expect(loadRoot(data)).rejects.toThrow(/chmod 700/);
    chmodSync(data, 0o700);
    const cert = readFileSync(join(data, 'root-cert.pem'), 'utf8');
    writeFileSync(join(data, 'root-cert.pem'), (await loadRoot(join(directory, 'other'))).bundle);
    await expect(loadRoot(data)).rejects.toThrow(/none of its 1 certificates/);
    writeFileSync(join(data, 'root-cert.pem'), 'garbage');
    await expect(loadRoot(data)).rejects.toThrow(/none of its 0 certificates/);
    writeFileSync(join(data, 'root-cert.pem'), cert);
    rmSync(key);
    await expect(loadRoot(data)).rejects.toThrow(/restore the key/);
    expect(existsSync(key)).toBe(false);
    writeFileSync(key, 'garbage', { mode: 0o600 });
    await expect(loadRoot(data)).rejects.toThrow(/cannot be used as the root key/);
  });
});

describe('node tokens', () => {
  test('are made once, private, and void when the node goes', () => {
    const tokens = new NodeTokens(join(directory, 'tokens'));
    expect(tokens.setNodes(['a', 'b']).added).toEqual(['a', 'b']);
    const file = join(directory, 'tokens/a');
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(statSync(join(directory, 'tokens')).mode & 0o777).toBe(0o700);
    const token = readFileSync(file, 'utf8').trim();
    expect(Buffer.from(token, 'base64url')).toHaveLength(32);
    expect(tokens.nodeOf(token)).toBe('a');
    expect(tokens.nodeOf(`${token}x`)).toBeUndefined();
    expect(tokens.nodeOf('')).toBeUndefined();
    expect(new NodeTokens(join(directory, 'tokens')).nodeOf(token)).toBeUndefined();

    const restarted = new NodeTokens(join(directory, 'tokens'));
    restarted.setNodes([]);
    restarted.setNodes(['a']);
    expect(restarted.nodeOf(token)).toBe('a');
    expect(restarted.setNodes(['b']).removed).toEqual(['a']);
    expect(restarted.nodeOf(token)).toBeUndefined();
    expect(existsSync(file)).toBe(false);
    restarted.setNodes(['a']);
    expect(readFileSync(file, 'utf8').trim()).not.toBe(token);
  });

  test('names that are no Node names touch no file', () => {
    const tokens = new NodeTokens(join(directory, 'tokens'));
    const names = ['../x', 'a/b', '..', '.', '', 'A', 'a..b', `${'a'.repeat(254)}`];
    expect(tokens.setNodes(names).refused).toEqual(names);
    expect(existsSync(join(directory, 'x'))).toBe(false);
  });

  test('a token file that was spoilt or copied is replaced', () => {
    mkdirSync(join(directory, 'tokens'), { mode: 0o700 });
    writeFileSync(join(directory, 'tokens/a'), 'short\n');
    const tokens = new NodeTokens(join(directory, 'tokens'));
    tokens.setNodes(['a']);
    const token = readFileSync(join(directory, 'tokens/a'), 'utf8').trim();
    expect(token).toHaveLength(43);
    writeFileSync(join(directory, 'tokens/b'), token);
    tokens.setNodes(['a', 'b']);
    expect(tokens.nodeOf(token)).toBe('a');
    expect(readFileSync(join(directory, 'tokens/b'), 'utf8').trim()).not.toBe(token);
  });
});
