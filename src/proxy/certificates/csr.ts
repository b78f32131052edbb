/** Keys and certificate signing requests (PKCS#10, RFC 2986) of workloads. */
import { generateKeyPair, type KeyObject, sign } from 'node:crypto';
import { promisify } from 'node:util';
import { BIT_STRING, BOOLEAN, der, INTEGER, OCTET_STRING, oid, SEQUENCE, SET } from './der.js';

const generate = promisify(generateKeyPair);

const EXTENSION_REQUEST = oid('1.2.840.113549.1.9.14');
const SUBJECT_ALT_NAME = oid('2.5.29.17');
const ECDSA_WITH_SHA256 = oid('1.2.840.10045.4.3.2');
/** GeneralName, choice 6: uniformResourceIdentifier. */
const URI_NAME = 0x86;
/** CertificationRequestInfo, attributes [0] IMPLICIT. */
const ATTRIBUTES = 0xa0;

/** A new ECDSA P-256 key pair; the private key never leaves this process. */
export async function newKey(): Promise<{ readonly publicKey: KeyObject; readonly privateKey: KeyObject }> {
  return generate('ec', { namedCurve: 'P-256' });
}

/**
 * A request for a certificate of one SPIFFE identity: empty subject, one critical subject alternative name of one URI.
 * @param uri ASCII
 * @returns PEM
 */
export function makeCsr(uri: string, keys: { readonly publicKey: KeyObject; readonly privateKey: KeyObject }): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: an IA5String is what ASCII is.
  if (!/^[\x00-\x7f]+$/.test(uri))
    throw new Error(`${JSON.stringify(uri)} is not ASCII and cannot be in a certificate`);
  const names = der(SEQUENCE, der(URI_NAME, Buffer.from(uri, 'ascii')));
  const extension = der(SEQUENCE, SUBJECT_ALT_NAME, der(BOOLEAN, Buffer.from([0xff])), der(OCTET_STRING, names));
  const attribute = der(SEQUENCE, EXTENSION_REQUEST, der(SET, der(SEQUENCE, extension)));
  const version = der(INTEGER, Buffer.from([0]));
  const emptySubject = der(SEQUENCE);
  const spki = keys.publicKey.export({ type: 'spki', format: 'der' });
  const info = der(SEQUENCE, version, emptySubject, spki, der(ATTRIBUTES, attribute));
  const signature = sign('sha256', info, { key: keys.privateKey, dsaEncoding: 'der' });
  const noUnusedBits = Buffer.from([0]);
  const request = der(SEQUENCE, info, der(SEQUENCE, ECDSA_WITH_SHA256), der(BIT_STRING, noUnusedBits, signature));
  const lines = request.toString('base64').match(/.{1,64}/g) ?? [];
  return ['-----BEGIN CERTIFICATE REQUEST-----', ...lines, '-----END CERTIFICATE REQUEST-----', ''].join('\n');
}
