/** Certificate signing requests: what is believed of a PKCS#10 request is its public key, and that once its signature holds. */
import './root.js';
import { createPublicKey } from 'node:crypto';
import * as x509 from '@peculiar/x509';

/** A request of a proxy has some 500 bytes; one with RSA 4096 some 2,000. */
const MAX_PEM_LENGTH = 16_384;
const PEM =
  /^\s*-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END (?:NEW )?CERTIFICATE REQUEST-----\s*$/;
const MIN_RSA_BITS = 2048;

/**
 * The public key of a request whose signature was verified (proof of possession).
 * @param pem exactly one PEM block
 * @throws Error saying why the request is refused
 */
export async function publicKeyOfRequest(pem: string): Promise<x509.PublicKey> {
  if (pem.length > MAX_PEM_LENGTH)
    throw new Error(`the request has ${pem.length} characters, more than ${MAX_PEM_LENGTH}`);
  const match = PEM.exec(pem);
  if (match === null) throw new Error('the request is not one PEM block of a CERTIFICATE REQUEST');
  let request: x509.Pkcs10CertificateRequest;
  let key: x509.PublicKey;
  try {
    request = new x509.Pkcs10CertificateRequest(Buffer.from(match[1] ?? '', 'base64'));
    key = request.publicKey;
  } catch (error) {
    throw new Error(`the request is not PKCS#10: ${(error as Error).message}`);
  }
  checkKey(key);
  let verified: boolean;
  try {
    verified = await request.verify();
  } catch (error) {
    throw new Error(`the signature of the request cannot be checked: ${(error as Error).message}`);
  }
  if (!verified) throw new Error('the signature of the request does not fit its key');
  return key;
}

function checkKey(key: x509.PublicKey): void {
  let parsed: ReturnType<typeof createPublicKey>;
  try {
    parsed = createPublicKey({ key: Buffer.from(key.rawData), format: 'der', type: 'spki' });
  } catch (error) {
    throw new Error(`the key of the request cannot be read: ${(error as Error).message}`);
  }
  const details = parsed.asymmetricKeyDetails;
  switch (parsed.asymmetricKeyType) {
    case 'ec':
      if (details?.namedCurve === 'prime256v1' || details?.namedCurve === 'secp384r1') return;
      throw new Error(`the key of the request is on curve ${details?.namedCurve}; use P-256 or P-384`);
    case 'rsa':
      if ((details?.modulusLength ?? 0) >= MIN_RSA_BITS) return;
      throw new Error(`the RSA key of the request has ${details?.modulusLength} bits; use ${MIN_RSA_BITS} or more`);
    default:
      throw new Error(`the key of the request is of type ${parsed.asymmetricKeyType}; use ECDSA P-256`);
  }
}
