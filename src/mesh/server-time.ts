/**
 * Asks a server of the control plane for its time where an ordinary connection fails because of the time: its certificate is
 * checked against the roots and by its name, but not for its dates. Nothing is sent that is secret, and what is learned is told,
 * not acted upon.
 */
import { X509Certificate } from 'node:crypto';
import { type ClientHttp2Session, connect } from 'node:http2';
import { isIPv6 } from 'node:net';
import { checkServerIdentity, rootCertificates, type TLSSocket } from 'node:tls';
import { type Clock, type ClockOffset, now, offsetByDate, SYSTEM_CLOCK } from './clock.js';
import { splitPem } from './pem.js';

export interface ServerTimeOptions {
  /** DNS name or address without brackets. */
  readonly host: string;
  readonly port: number;
  /** PEM; undefined: the system's own. */
  readonly roots: string | undefined;
  /** A second name that the certificate may hold, "" for none. */
  readonly altHostname?: string;
  readonly timeoutMs?: number;
  readonly clock?: Clock;
}

export interface ServerTime {
  /** By the Date of its answer; undefined where it has none, as istiod's has not. */
  readonly offset: ClockOffset | undefined;
  readonly notBeforeMs: number;
  readonly notAfterMs: number;
}

const TIMEOUT_MS = 5000;
const MAX_DEPTH = 8;

/** @throws Error where the server cannot be reached, or is not the one that the roots vouch for */
export async function askTime(options: ServerTimeOptions): Promise<ServerTime> {
  const { host, port, roots, timeoutMs = TIMEOUT_MS, clock = SYSTEM_CLOCK } = options;
  const session = connect(`https://${isIPv6(host) ? `[${host}]` : host}:${port}`, { rejectUnauthorized: false });
  // Of what comes after the answer nothing is of interest.
  session.on('error', () => {});
  const timer = setTimeout(() => session.destroy(new Error(`no answer within ${timeoutMs} ms`)), timeoutMs);
  try {
    await connected(session);
    const leaf = (session.socket as TLSSocket).getPeerX509Certificate();
    if (leaf === undefined) throw new Error('the server showed no certificate');
    checkName(leaf, options);
    checkChain(leaf, roots === undefined ? rootCertificates : splitPem(roots));
    const sent = now(clock);
    const date = await dateOf(session);
    return {
      offset: offsetByDate(date, sent, now(clock)),
      notBeforeMs: Date.parse(leaf.validFrom),
      notAfterMs: Date.parse(leaf.validTo),
    };
  } finally {
    clearTimeout(timer);
    session.destroy();
  }
}

/**
 * What the dates of a server's own certificate tell of the clock here where they are all there is: no server shows a certificate
 * that is not valid yet, unless its own clock is wrong.
 * @returns the least offset that there is, undefined where the certificate is valid here or may really have ended
 */
export function offsetByCertificate({ notBeforeMs }: ServerTime, wallMs: number): ClockOffset | undefined {
  return notBeforeMs > wallMs ? { offsetMs: notBeforeMs - wallMs, uncertaintyMs: 0 } : undefined;
}

function connected(session: ClientHttp2Session): Promise<void> {
  return new Promise((resolve, reject) => {
    session.once('connect', () => resolve());
    session.once('error', reject);
    session.once('close', () => reject(new Error('the connection was closed')));
  });
}

/** Any answer will do: a gRPC server refuses this one. */
function dateOf(session: ClientHttp2Session): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const request = session.request({ ':method': 'GET', ':path': '/' });
    request.once('response', (headers) => resolve(headers['date']));
    request.once('error', reject);
    request.once('close', () => resolve(undefined));
    session.once('error', reject);
    request.resume();
    request.end();
  });
}

function checkName(leaf: X509Certificate, { host, altHostname = '' }: ServerTimeOptions): void {
  const certificate = leaf.toLegacyObject();
  const problem = checkServerIdentity(host, certificate);
  if (problem === undefined) return;
  if (altHostname !== '' && checkServerIdentity(altHostname, certificate) === undefined) return;
  throw problem;
}

/** As a verifier does but for dates: each certificate is signed by the next, the last by a root. */
function checkChain(leaf: X509Certificate, roots: readonly string[]): void {
  const trusted = roots.map((pem) => new X509Certificate(pem));
  let certificate = leaf;
  for (let depth = 0; depth < MAX_DEPTH; depth++) {
    const { fingerprint256 } = certificate;
    if (depth > 0 && trusted.some((root) => root.fingerprint256 === fingerprint256)) return;
    if (trusted.some((root) => isSignedBy(certificate, root))) return;
    const next = certificate.issuerCertificate;
    if (next === undefined || next.fingerprint256 === fingerprint256 || !isSignedBy(certificate, next)) break;
    certificate = next;
  }
  throw new Error(
    `the server's certificate (${leaf.subjectAltName ?? leaf.subject}) is not of a root that is trusted here`,
  );
}

const isSignedBy = (certificate: X509Certificate, issuer: X509Certificate): boolean =>
  issuer.ca && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
