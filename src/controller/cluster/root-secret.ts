/** Roots of trust as Secrets hold them, in Istio's shapes: read, checked, made. */
import 'reflect-metadata';
import { createPrivateKey, createPublicKey, type KeyObject, webcrypto, X509Certificate } from 'node:crypto';
import * as x509 from '@peculiar/x509';
import { splitPem } from '../../mesh/pem.js';
import { ECDSA_P256, type Root, type SigningAlgorithm, selfSign } from '../root.js';

/** The Secret of a root that the controller made itself, and its type. */
export const SELF_SIGNED_SECRET = 'istio-ca-secret';
export const SELF_SIGNED_TYPE = 'istio.io/ca-root';
/** The Secret of a root, or an intermediate, that an operator made. It goes before the other. */
export const PLUGGED_SECRET = 'cacerts';

/** A Secret, its values as text. */
export interface SecretTexts {
  readonly name: string;
  readonly resourceVersion: string;
  readonly annotations: Readonly<Record<string, string>>;
  readonly data: Readonly<Record<string, string>>;
}

interface KeyImport {
  readonly algorithm: webcrypto.RsaHashedImportParams | webcrypto.EcKeyImportParams;
  readonly signing: SigningAlgorithm;
}

/**
 * Reads a root, or an intermediate with its chain.
 * @throws Error saying which value of the Secret cannot be used, and why
 */
export async function readRootSecret({ name, data }: SecretTexts, now: Date): Promise<Root> {
  const fail = (message: string): never => {
    throw new Error(`Secret ${name}: ${message}`);
  };
  const certificateKey = data['ca-cert.pem'] === undefined ? 'tls.crt' : 'ca-cert.pem';
  const keyKey = data['ca-key.pem'] === undefined ? 'tls.key' : 'ca-key.pem';
  const signers = splitPem(data[certificateKey] ?? '');
  const signerPem = signers[0] ?? fail('it has no certificate in ca-cert.pem or tls.crt');
  const read = (pem: string, where: string): X509Certificate => {
    try {
      return new X509Certificate(pem);
    } catch (error) {
      return fail(`a certificate of ${where} cannot be read: ${(error as Error).message}`);
    }
  };
  const signer = read(signerPem, certificateKey);
  if (!signer.ca) fail(`${certificateKey} is no CA certificate`);
  if (new Date(signer.validTo) <= now) fail(`${certificateKey} expired at ${signer.validTo}`);
  let key: KeyObject;
  try {
    key = createPrivateKey(data[keyKey] ?? '');
  } catch (error) {
    return fail(`${keyKey} is no private key: ${(error as Error).message}`);
  }
  const spki = (object: KeyObject): Buffer => object.export({ type: 'spki', format: 'der' });
  if (!spki(createPublicKey(key)).equals(spki(signer.publicKey))) fail(`${keyKey} is not the key of ${certificateKey}`);

  const selfSigned = isRoot(signer);
  const rootTexts = splitPem(data['root-cert.pem'] || data['ca.crt'] || '');
  const roots = rootTexts.length > 0 ? rootTexts : selfSigned ? [signerPem] : [];
  if (roots.length === 0) fail('it has no root-cert.pem (or ca.crt), which an intermediate needs');
  for (const pem of roots) if (!read(pem, 'root-cert.pem').ca) fail('a certificate of root-cert.pem is no CA');
  const rest = [...signers.slice(1), ...splitPem(data['cert-chain.pem'] ?? '')].map((pem) =>
    read(pem, 'cert-chain.pem'),
  );
  const chain = selfSigned
    ? []
    : chainOf(
        signer,
        rest,
        roots.map((pem) => read(pem, 'root-cert.pem')),
      );
  if (chain === undefined) fail('its certificates are no chain from ca-cert.pem to a root of root-cert.pem');
  if (selfSigned && !roots.some((pem) => read(pem, 'root-cert.pem').fingerprint256 === signer.fingerprint256)) {
    fail('its signing root is not in root-cert.pem');
  }
  const { algorithm, signing } =
    importOf(key) ?? fail(`${keyKey} is of type ${key.asymmetricKeyType}; use RSA, P-256 or P-384`);
  const pkcs8 = key.export({ type: 'pkcs8', format: 'der' });
  return {
    certificate: new x509.X509Certificate(signerPem),
    signingKey: await webcrypto.subtle.importKey('pkcs8', pkcs8, algorithm, false, ['sign']),
    signingAlgorithm: signing,
    chain: (chain ?? []).map((certificate) => certificate.toString().trim()),
    bundle: `${roots.join('\n')}\n`,
  };
}

function isRoot(certificate: X509Certificate): boolean {
  return certificate.checkIssued(certificate) && certificate.verify(certificate.publicKey);
}

/** From the signer up to, and without, a root; undefined where that does not lead to one. */
function chainOf(
  signer: X509Certificate,
  others: readonly X509Certificate[],
  roots: readonly X509Certificate[],
): X509Certificate[] | undefined {
  const chain: X509Certificate[] = [];
  let current = signer;
  const issued = (issuer: X509Certificate): boolean => current.checkIssued(issuer) && current.verify(issuer.publicKey);
  while (chain.length <= others.length) {
    chain.push(current);
    if (roots.some(issued)) return chain;
    const next = others.find(
      (candidate) => !chain.some((seen) => seen.fingerprint256 === candidate.fingerprint256) && issued(candidate),
    );
    if (next === undefined) return undefined;
    current = next;
  }
  return undefined;
}

function importOf(key: KeyObject): KeyImport | undefined {
  if (key.asymmetricKeyType === 'rsa') {
    const algorithm = { name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256' };
    return { algorithm, signing: algorithm };
  }
  switch (key.asymmetricKeyDetails?.namedCurve) {
    case 'prime256v1':
      return { algorithm: ECDSA_P256, signing: { name: 'ECDSA', hash: 'SHA-256' } };
    case 'secp384r1':
      return { algorithm: { name: 'ECDSA', namedCurve: 'P-384' }, signing: { name: 'ECDSA', hash: 'SHA-384' } };
    default:
      return undefined;
  }
}

/** A new root: certificate and key as PEM. */
export async function makeRoot(now: Date): Promise<{ readonly certificate: string; readonly key: string }> {
  const keys = await webcrypto.subtle.generateKey(ECDSA_P256, true, ['sign', 'verify']);
  const der = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
  const key = createPrivateKey({ key: der, format: 'der', type: 'pkcs8' });
  return {
    certificate: `${(await selfSign(keys, now)).toString('pem')}\n`,
    key: String(key.export({ type: 'pkcs8', format: 'pem' })),
  };
}

/** Values of {@link SELF_SIGNED_SECRET}; the empty ones are those that Istio reads and never uses. */
export function selfSignedData(certificate: string, key: string, bundle: string): Record<string, string> {
  return {
    'ca-cert.pem': certificate,
    'ca-key.pem': key,
    'cert-chain.pem': '',
    'key.pem': '',
    'root-cert.pem': bundle,
  };
}

/** Fingerprints of a bundle's certificates. */
export function fingerprints(bundle: string): Set<string> {
  return new Set(splitPem(bundle).map((pem) => new X509Certificate(pem).fingerprint256));
}
