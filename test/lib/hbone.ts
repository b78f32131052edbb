/** Hand-made HBONE clients in pods, and the certificates they show. */
import { createPrivateKey, webcrypto } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import * as x509 from '@peculiar/x509';
import { ECDSA_P256, ECDSA_SHA256, type Root, randomSerial } from '../../src/controller/root.ts';
import type { Pod } from '../../src/lab/index.ts';

const PROGRAM = fileURLToPath(new URL('programs/hbone.ts', import.meta.url));

export interface HboneRequest {
  readonly headers: Readonly<Record<string, string>>;
  /** Sent once the answer is 200; then the end. */
  readonly payload?: string;
}

/** What the client does. */
export interface HboneSpec {
  readonly host: string;
  readonly port: number;
  /** PEM; undefined: no certificate. */
  readonly cert?: string;
  readonly key?: string;
  /** Undefined: no ALPN. */
  readonly alpn?: readonly string[];
  readonly minVersion?: 'TLSv1.2' | 'TLSv1.3';
  readonly maxVersion?: 'TLSv1.2' | 'TLSv1.3';
  /** Sent instead of a TLS handshake. */
  readonly plain?: string;
  readonly requests?: readonly HboneRequest[];
}

export interface HboneAnswer {
  readonly status: number;
  readonly body: string;
  readonly error?: string;
}

export interface HboneResult {
  /** `open`: the server sent something after the handshake, which it does to whom it accepts. */
  readonly outcome: 'open' | 'refused' | 'silent';
  readonly error: string;
  readonly answers: readonly HboneAnswer[];
}

/** Runs the client in a pod. */
export async function hbone(pod: Pod, spec: HboneSpec): Promise<HboneResult> {
  const done = await pod.run([process.execPath, PROGRAM, JSON.stringify(spec)], { timeoutMs: 60_000 });
  if (done.code !== 0 || done.stdout === '') {
    throw new Error(`the HBONE client in ${pod.id} failed (${done.code}): ${done.stderr}`);
  }
  return JSON.parse(done.stdout) as HboneResult;
}

export interface Credentials {
  readonly cert: string;
  readonly key: string;
}

export interface CertificateOptions {
  /** Distinguished name. Default: empty, as workloads have it. */
  readonly subject?: string;
  /** URI SAN; undefined: none. */
  readonly identity?: string;
  /** Who signs; undefined: the certificate's own key. */
  readonly issuer?: { readonly certificate: x509.X509Certificate; readonly signingKey: CryptoKey };
  readonly notBefore?: Date;
  readonly notAfter?: Date;
  /** Object identifiers of the extended key usage. Default: clientAuth. */
  readonly usages?: readonly string[];
}

const HOUR_MS = 3_600_000;
export const SERVER_AUTH = '1.3.6.1.5.5.7.3.1';
const CLIENT_AUTH = '1.3.6.1.5.5.7.3.2';

/** A certificate with whatever is wanted wrong in it; PEM, the issuer's behind it. */
export async function makeCertificate(
  options: CertificateOptions,
): Promise<Credentials & Pick<Root, 'certificate' | 'signingKey'>> {
  const keys = await webcrypto.subtle.generateKey(ECDSA_P256, true, ['sign', 'verify']);
  const signingKey = options.issuer?.signingKey ?? keys.privateKey;
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: randomSerial(),
    subject: options.subject ?? '',
    issuer: options.issuer?.certificate.subject ?? options.subject ?? '',
    notBefore: options.notBefore ?? new Date(Date.now() - HOUR_MS),
    notAfter: options.notAfter ?? new Date(Date.now() + HOUR_MS),
    signingAlgorithm: ECDSA_SHA256,
    publicKey: keys.publicKey,
    signingKey,
    extensions: [
      ...(options.identity === undefined
        ? []
        : [new x509.SubjectAlternativeNameExtension([{ type: 'url', value: options.identity }], true)]),
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([...(options.usages ?? [CLIENT_AUTH])]),
    ],
  });
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey('pkcs8', keys.privateKey));
  const chain = [certificate, ...(options.issuer === undefined ? [] : [options.issuer.certificate])];
  return {
    cert: chain.map((each) => `${each.toString('pem')}\n`).join(''),
    key: String(
      createPrivateKey({ key: pkcs8, format: 'der', type: 'pkcs8' }).export({ type: 'pkcs8', format: 'pem' }),
    ),
    certificate,
    signingKey: keys.privateKey,
  };
}
