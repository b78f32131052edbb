/** The certificate authority's hands: it signs workload certificates and the controller's own server certificate. */
import './root.js';
import { createPrivateKey, webcrypto } from 'node:crypto';
import { isIP } from 'node:net';
import * as x509 from '@peculiar/x509';
import { formatIdentity, type Identity } from '../mesh/identity.js';
import { ECDSA_P256, type Root, randomSerial } from './root.js';

/** Clocks of nodes may be behind by this much (Istio backdates by the same two minutes). */
const MAX_BACKDATE_SECONDS = 120;

export interface ServerCertificate {
  /** PEM: leaf and intermediates. */
  readonly certificate: string;
  /** PEM, PKCS#8. */
  readonly privateKey: string;
  readonly notAfter: Date;
}

export interface Authority {
  /** All trusted roots, PEM. */
  readonly bundle: string;
  /**
   * Signs a certificate for a workload.
   * @returns PEM certificates as CreateCertificate answers them: leaf, each intermediate, then the root bundle
   */
  signWorkload(identity: Identity, publicKey: x509.PublicKey, ttlSeconds: number): Promise<SignedWorkload>;
  /** A new key and server certificate. @param names DNS names and IP addresses */
  issueServer(names: readonly string[], ttlSeconds: number): Promise<ServerCertificate>;
}

export interface SignedWorkload {
  readonly chain: readonly string[];
  readonly serialNumber: string;
  readonly notAfter: Date;
}

/**
 * Lifetime that a request gets: what it asks for up to the configured maximum, the maximum where it asks for nothing.
 * Istio refuses what is above its maximum; here it is lowered, so that one setting shortens all certificates.
 */
export function grantedTtl(requestedSeconds: number, maxSeconds: number): number {
  return requestedSeconds > 0 ? Math.min(Math.floor(requestedSeconds), maxSeconds) : maxSeconds;
}

/**
 * Validity of a certificate issued now: never outside its issuer's. Backdated by two minutes, but by no more than a tenth
 * of the lifetime: proxies renew at half of the whole validity, which else lies in the past for a certificate of 30 s.
 */
export function validity(
  now: Date,
  ttlSeconds: number,
  issuer: x509.X509Certificate,
): { notBefore: Date; notAfter: Date } {
  const backdate = Math.min(MAX_BACKDATE_SECONDS, Math.floor(ttlSeconds / 10));
  const notBefore = Math.max(now.getTime() - backdate * 1000, issuer.notBefore.getTime());
  const notAfter = Math.min(now.getTime() + ttlSeconds * 1000, issuer.notAfter.getTime());
  return { notBefore: new Date(notBefore), notAfter: new Date(notAfter) };
}

/** An authority over a root. @param now the clock, for tests */
export function createAuthority(root: Root, now: () => Date = () => new Date()): Authority {
  // By the name that the issuer gives itself: a verifier compares the two, and names are made in more than one way.
  const issuerKeyId = root.certificate.getExtension(x509.SubjectKeyIdentifierExtension)?.keyId;
  const authorityKey = issuerKeyId === undefined ? [] : [new x509.AuthorityKeyIdentifierExtension(issuerKeyId)];
  const sign = async (
    publicKey: x509.PublicKey | CryptoKey,
    names: x509.JsonGeneralName[],
    usages: x509.ExtendedKeyUsageType[],
    ttlSeconds: number,
  ): Promise<x509.X509Certificate> =>
    x509.X509CertificateGenerator.create({
      serialNumber: randomSerial(),
      issuer: root.certificate.subjectName,
      ...validity(now(), ttlSeconds, root.certificate),
      signingAlgorithm: root.signingAlgorithm,
      signingKey: root.signingKey,
      publicKey,
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature | x509.KeyUsageFlags.keyEncipherment, true),
        new x509.ExtendedKeyUsageExtension(usages),
        // Critical because the subject is empty (RFC 5280, 4.2.1.6).
        new x509.SubjectAlternativeNameExtension(names, true),
        await x509.SubjectKeyIdentifierExtension.create(publicKey),
        ...authorityKey,
      ],
    });
  return {
    bundle: root.bundle,
    async signWorkload(identity, publicKey, ttlSeconds) {
      const uri: x509.JsonGeneralName = { type: 'url', value: formatIdentity(identity) };
      const usages = [x509.ExtendedKeyUsage.serverAuth, x509.ExtendedKeyUsage.clientAuth];
      const leaf = await sign(publicKey, [uri], usages, ttlSeconds);
      return {
        chain: [`${leaf.toString('pem')}\n`, ...root.chain.map((pem) => `${pem}\n`), root.bundle],
        serialNumber: leaf.serialNumber,
        notAfter: leaf.notAfter,
      };
    },
    async issueServer(names, ttlSeconds) {
      const keys = await webcrypto.subtle.generateKey(ECDSA_P256, true, ['sign', 'verify']);
      const general = names.map((value): x509.JsonGeneralName => ({ type: isIP(value) === 0 ? 'dns' : 'ip', value }));
      const leaf = await sign(keys.publicKey, general, [x509.ExtendedKeyUsage.serverAuth], ttlSeconds);
      const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
      const privateKey = createPrivateKey({ key: pkcs8, format: 'der', type: 'pkcs8' });
      return {
        certificate: [leaf.toString('pem'), ...root.chain].map((pem) => `${pem}\n`).join(''),
        privateKey: String(privateKey.export({ type: 'pkcs8', format: 'pem' })),
        notAfter: leaf.notAfter,
      };
    },
  };
}
