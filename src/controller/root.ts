/** The root of trust: one ECDSA P-256 key that signs, and every root certificate that proxies shall trust. */
import 'reflect-metadata';
import { createPrivateKey, createPublicKey, randomBytes, webcrypto, X509Certificate } from 'node:crypto';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import * as x509 from '@peculiar/x509';
import { splitPem } from '../mesh/pem.js';
import { ensurePrivateDirectory, writeFileAtomic } from './files.js';

x509.cryptoProvider.set(webcrypto as Crypto);

export const ECDSA_P256 = { name: 'ECDSA', namedCurve: 'P-256' } as const;
export const ECDSA_SHA256 = { name: 'ECDSA', hash: 'SHA-256' } as const;

/** The signing key, PKCS#8 PEM, mode 0600. */
export const KEY_FILE = 'root-key.pem';
/** Every trusted root, PEM; among them that of the signing key. */
export const CERTIFICATES_FILE = 'root-cert.pem';
/** How a key signs. */
export type SigningAlgorithm = { readonly name: string; readonly hash: string };

/** Lifetime of a new root, as Istio's self-signed CA has it. */
const ROOT_DAYS = 3650;
/** A new root is valid since before now, so that nodes with slow clocks accept it. */
const ROOT_BACKDATE_MS = 3_600_000;

export interface Root {
  /** The certificate whose key signs. */
  readonly certificate: x509.X509Certificate;
  readonly signingKey: CryptoKey;
  readonly signingAlgorithm: SigningAlgorithm;
  /** PEM of what stands between a leaf and the roots, nearest to the leaf first; empty where a root signs. */
  readonly chain: readonly string[];
  /** All trusted roots as PEM, the content of root-cert.pem. */
  readonly bundle: string;
}

/** Positive 128 bit serial number in hexadecimal. */
export function randomSerial(): string {
  const bytes = randomBytes(16);
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40;
  return bytes.toString('hex');
}

/**
 * Loads the root from `directory` (root-key.pem, root-cert.pem), making it at the first start.
 * root-cert.pem may hold further roots, which are distributed beside the signing one.
 * @throws Error where the files are not whole, do not fit each other, or the key is readable by others
 */
export async function loadRoot(directory: string, now: Date = new Date()): Promise<Root> {
  ensurePrivateDirectory(directory);
  const keyPath = join(directory, KEY_FILE);
  const certPath = join(directory, CERTIFICATES_FILE);
  if (!existsSync(keyPath)) {
    if (existsSync(certPath)) {
      throw new Error(
        `${certPath} exists but ${keyPath} does not: restore the key, or remove both to begin with a new root`,
      );
    }
    const keys = await webcrypto.subtle.generateKey(ECDSA_P256, true, ['sign', 'verify']);
    const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
    const pem = createPrivateKey({ key: pkcs8, format: 'der', type: 'pkcs8' }).export({ type: 'pkcs8', format: 'pem' });
    writeFileAtomic(keyPath, String(pem), 0o600);
  }
  const keys = await readKeys(keyPath);
  // A key without a certificate is what a start that was cut short leaves: the certificate is made of the same key.
  if (!existsSync(certPath)) {
    writeFileAtomic(certPath, `${(await selfSign(keys, now)).toString('pem')}\n`, 0o644);
  }
  return readRoot(readFileSync(certPath, 'utf8'), certPath, keys, now);
}

/**
 * Reads the root that is in `directory` now, for a change while the controller runs: nothing is made.
 * @throws Error where the files cannot take the place of the ones in force
 */
export async function rereadRoot(directory: string, now: Date = new Date()): Promise<Root> {
  const certPath = join(directory, CERTIFICATES_FILE);
  const keys = await readKeys(join(directory, KEY_FILE));
  return readRoot(readFileSync(certPath, 'utf8'), certPath, keys, now);
}

async function readKeys(path: string): Promise<webcrypto.CryptoKeyPair> {
  const mode = statSync(path).mode & 0o777;
  if ((mode & 0o077) !== 0) {
    throw new Error(`${path} has mode ${mode.toString(8)}: others can read the root key; run chmod 600 ${path}`);
  }
  return importKeys(readFileSync(path, 'utf8'), path);
}

async function readRoot(text: string, path: string, keys: webcrypto.CryptoKeyPair, now: Date): Promise<Root> {
  const spki = Buffer.from(await webcrypto.subtle.exportKey('spki', keys.publicKey));
  const certificates = splitPem(text);
  let signing: string | undefined;
  for (const [index, pem] of certificates.entries()) {
    let certificate: X509Certificate;
    try {
      certificate = new X509Certificate(pem);
    } catch (error) {
      throw new Error(`${path}: certificate ${index + 1} cannot be read: ${(error as Error).message}`);
    }
    if (!certificate.ca) throw new Error(`${path}: certificate ${index + 1} (${certificate.subject}) is not a CA`);
    if (certificate.publicKey.export({ type: 'spki', format: 'der' }).equals(spki)) signing ??= pem;
  }
  if (signing === undefined) {
    throw new Error(`${path}: none of its ${certificates.length} certificates belongs to root-key.pem beside it`);
  }
  const certificate = new x509.X509Certificate(signing);
  if (certificate.notAfter <= now) {
    throw new Error(`${path}: the signing root expired at ${certificate.notAfter.toISOString()}`);
  }
  if (certificate.notBefore > now) {
    throw new Error(`${path}: the signing root is not valid before ${certificate.notBefore.toISOString()}`);
  }
  return {
    certificate,
    signingKey: keys.privateKey,
    signingAlgorithm: ECDSA_SHA256,
    chain: [],
    bundle: `${certificates.join('\n')}\n`,
  };
}

/** A new root certificate of a key pair. */
export async function selfSign(keys: webcrypto.CryptoKeyPair, now: Date): Promise<x509.X509Certificate> {
  return x509.X509CertificateGenerator.createSelfSigned({
    serialNumber: randomSerial(),
    name: 'O=ebbtide, CN=ebbtide root',
    notBefore: new Date(now.getTime() - ROOT_BACKDATE_MS),
    notAfter: new Date(now.getTime() + ROOT_DAYS * 86_400_000),
    signingAlgorithm: ECDSA_SHA256,
    keys,
    extensions: [
      // Path length 0: what this root signs can never sign anything itself.
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
}

async function importKeys(pem: string, path: string): Promise<webcrypto.CryptoKeyPair> {
  let pkcs8: Buffer<ArrayBuffer>;
  let spki: Buffer<ArrayBuffer>;
  try {
    const key = createPrivateKey(pem);
    if (key.asymmetricKeyDetails?.namedCurve !== 'prime256v1') throw new Error('it is not an ECDSA P-256 key');
    pkcs8 = Buffer.from(key.export({ type: 'pkcs8', format: 'der' }));
    spki = Buffer.from(createPublicKey(key).export({ type: 'spki', format: 'der' }));
  } catch (error) {
    throw new Error(`${path} cannot be used as the root key: ${(error as Error).message}`);
  }
  const subtle = webcrypto.subtle;
  return {
    privateKey: await subtle.importKey('pkcs8', pkcs8, ECDSA_P256, false, ['sign']),
    publicKey: await subtle.importKey('spki', spki, ECDSA_P256, true, ['verify']),
  };
}
