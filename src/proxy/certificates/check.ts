/** What the certificate authority answered, checked before anything is done with it. */
import { type KeyObject, X509Certificate } from 'node:crypto';
import type { CertificateBundle } from '../engine.js';

export interface CheckedCertificate {
  readonly bundle: CertificateBundle;
  /** Leaf first, then intermediates. */
  readonly chain: readonly X509Certificate[];
  readonly roots: readonly X509Certificate[];
  /** Earliest end of the leaf and its intermediates, in milliseconds since the epoch. */
  readonly notAfterMs: number;
}

/**
 * Checks a CreateCertificate answer: leaf, intermediates one an element, and in the last element one or several roots.
 * @param identity SPIFFE URI that was asked for, which must be the leaf's first URI name
 * @throws Error saying what is wrong
 */
export function checkCertificate(
  identity: string,
  elements: readonly string[],
  privateKey: KeyObject,
  nowMs: number,
): CheckedCertificate {
  if (elements.length < 2) {
    throw new Error(`the answer holds ${elements.length} certificates; a leaf and a root at least are expected`);
  }
  const chain = elements.slice(0, -1).flatMap((pem, index) => parseCertificates(pem, `element ${index}`));
  const roots = parseCertificates(elements.at(-1) ?? '', 'the last element');
  const leaf = chain[0];
  if (leaf === undefined) throw new Error('the answer holds no leaf certificate');
  const named = firstUri(leaf);
  if (named !== identity) {
    throw new Error(`the certificate is of ${named ?? 'no URI'}, ${identity} was asked for`);
  }
  if (!leaf.checkPrivateKey(privateKey)) throw new Error('the certificate is not of the key that was sent');
  const notAfterMs = Math.min(...chain.map(({ validTo }) => Date.parse(validTo)));
  if (!(notAfterMs > nowMs)) {
    throw new Error(`the certificate ended at ${leaf.validTo}; check the clocks of this node and the authority`);
  }
  for (const [index, certificate] of chain.entries()) {
    const issuer = chain[index + 1];
    const candidates = issuer === undefined ? roots : [issuer];
    const issued = candidates.some(
      (candidate) => certificate.checkIssued(candidate) && certificate.verify(candidate.publicKey),
    );
    // An intermediate may itself be among the roots.
    if (!issued && !roots.some(({ fingerprint256 }) => fingerprint256 === certificate.fingerprint256)) {
      throw new Error(`certificate ${index} of the chain is not signed by ${issuer ? 'the next' : 'any of the roots'}`);
    }
  }
  return {
    bundle: {
      chainPem: chain.map(String).join(''),
      keyPem: String(privateKey.export({ type: 'pkcs8', format: 'pem' })),
      rootsPem: roots.map(String).join(''),
    },
    chain,
    roots,
    notAfterMs,
  };
}

const MAX_CERTIFICATES = 100;

function parseCertificates(pem: string, where: string): X509Certificate[] {
  const blocks = pem.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  if (blocks.length === 0) throw new Error(`${where} of the answer holds no PEM certificate`);
  if (blocks.length > MAX_CERTIFICATES) throw new Error(`${where} holds more than ${MAX_CERTIFICATES} certificates`);
  return blocks.map((block) => {
    try {
      return new X509Certificate(block);
    } catch (error) {
      throw new Error(`${where} of the answer cannot be read: ${(error as Error).message}`);
    }
  });
}

/** The first URI among the subject alternative names. Node quotes names that hold a comma: those are no SPIFFE identities. */
function firstUri(certificate: X509Certificate): string | undefined {
  const names = certificate.subjectAltName?.split(', ') ?? [];
  return names.find((name) => name.startsWith('URI:'))?.slice('URI:'.length);
}
