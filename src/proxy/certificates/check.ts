/** What the certificate authority answered, checked before anything is done with it. */
import { type KeyObject, X509Certificate } from 'node:crypto';
import type { ClockOffset } from '../../mesh/clock.js';
import { isSkewed, skewText } from '../../mesh/clock-skew.js';
import { splitPem } from '../../mesh/pem.js';
import type { CertificateBundle } from '../engine.js';

export interface CheckedCertificate {
  readonly bundle: CertificateBundle;
  /** Leaf first, then intermediates. */
  readonly chain: readonly X509Certificate[];
  readonly roots: readonly X509Certificate[];
  /** Latest begin of the leaf and its intermediates, in milliseconds since the epoch. */
  readonly notBeforeMs: number;
  /** Earliest end of them. */
  readonly notAfterMs: number;
  /** How long it is valid from when it came, by the authority's clock: no matter what the clock here says. */
  readonly remainingMs: number;
}

/** The certificate is good, but not by the clock of this machine. */
export class ClockSkewError extends Error {}

/** When a certificate came. */
export interface Received {
  /** By the wall clock here, in milliseconds since the epoch. */
  readonly wallMs: number;
  /** How far the authority's clock is ahead; undefined where it did not say. */
  readonly offset?: ClockOffset | undefined;
}

/**
 * Checks a CreateCertificate answer: leaf, intermediates one an element, and in the last element one or several roots.
 * @param identity SPIFFE URI that was asked for, which must be the leaf's first URI name
 * @throws Error saying what is wrong; ClockSkewError where nothing is but the time
 */
export function checkCertificate(
  identity: string,
  elements: readonly string[],
  privateKey: KeyObject,
  received: Received,
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
  const notBeforeMs = Math.max(...chain.map(({ validFrom }) => Date.parse(validFrom)));
  const notAfterMs = Math.min(...chain.map(({ validTo }) => Date.parse(validTo)));
  const authorityMs = authorityTime(received, notBeforeMs, notAfterMs);
  if (!(notAfterMs > authorityMs)) {
    throw new Error(`the certificate ended at ${leaf.validTo}, also by the clock of the authority that signed it now`);
  }
  if (received.wallMs >= notAfterMs) {
    throw new ClockSkewError(
      `clock skew: by the clock here (${new Date(received.wallMs).toISOString()}) the certificate that was signed now ended at ` +
        `${leaf.validTo}: this machine is ${skewText(authorityMs - received.wallMs)} or more, or the authority is wrong`,
    );
  }
  return {
    bundle: {
      chainPem: chain.map(String).join(''),
      keyPem: String(privateKey.export({ type: 'pkcs8', format: 'pem' })),
      rootsPem: roots.map(String).join(''),
    },
    chain,
    roots,
    notBeforeMs,
    notAfterMs,
    remainingMs: notAfterMs - authorityMs,
  };
}

/**
 * The authority's time, milliseconds since the epoch: as it said, or as the clock here has it, if that is a time at which the
 * certificate can have been signed at all.
 */
function authorityTime({ wallMs, offset }: Received, notBeforeMs: number, notAfterMs: number): number {
  // A Date has whole seconds: where the clocks agree, the one here is the finer one.
  if (offset !== undefined) return isSkewed(offset) ? wallMs + offset.offsetMs : wallMs;
  return wallMs >= notBeforeMs && wallMs < notAfterMs ? wallMs : notBeforeMs;
}

const MAX_CERTIFICATES = 100;

function parseCertificates(pem: string, where: string): X509Certificate[] {
  const blocks = splitPem(pem);
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
