/**
 * Replacing the root of trust without a moment in which two proxies do not trust each other: the new root is announced and
 * trusted, then it signs, then the old one is dropped, with time between the steps for every proxy to have followed.
 */
import { X509Certificate } from 'node:crypto';
import { splitPem } from '../../mesh/pem.js';
import { makeRoot, type SecretTexts, selfSignedData } from './root-secret.js';

/** Annotation on the Secret: where a rotation is, and since when. */
export const PHASE_ANNOTATION = 'ebbtide.dev/root-rotation';
export const SINCE_ANNOTATION = 'ebbtide.dev/root-rotation-since';
/** Annotation on the Secret that an operator sets to `true` to begin a rotation now. */
export const ROTATE_ANNOTATION = 'ebbtide.dev/rotate-root';

const NEXT_CERTIFICATE = 'next-ca-cert.pem';
const NEXT_KEY = 'next-ca-key.pem';
/** A root is replaced when less than this part of its life is left (as Istio's). */
const REMAINING = 0.2;

/** A change of the Secret; null removes. */
export interface RotationStep {
  readonly phase: 'announce' | 'switch' | 'drop';
  readonly data: Readonly<Record<string, string | null>>;
  readonly annotations: Readonly<Record<string, string | null>>;
}

/** Time between two steps: every certificate was issued anew in it, and with that every proxy was told all roots. */
export function overlapMs(ttlSeconds: number): number {
  return (ttlSeconds + Math.min(600, ttlSeconds)) * 1000;
}

/** The step that is due, or undefined. */
export async function nextStep(secret: SecretTexts, ttlSeconds: number, now: Date): Promise<RotationStep | undefined> {
  const { data, annotations } = secret;
  const phase = annotations[PHASE_ANNOTATION];
  const since = Date.parse(annotations[SINCE_ANNOTATION] ?? '');
  const waited = Number.isNaN(since) || now.getTime() - since >= overlapMs(ttlSeconds);
  const stamp = now.toISOString();
  const bundle = data['root-cert.pem'] || data['ca-cert.pem'] || '';
  if (phase === 'announced') {
    const [certificate, key] = [data[NEXT_CERTIFICATE], data[NEXT_KEY]];
    if (certificate === undefined || key === undefined) {
      return { phase: 'drop', data: {}, annotations: { [PHASE_ANNOTATION]: null, [SINCE_ANNOTATION]: null } };
    }
    if (!waited) return undefined;
    return {
      phase: 'switch',
      data: { ...selfSignedData(certificate, key, bundle), [NEXT_CERTIFICATE]: null, [NEXT_KEY]: null },
      annotations: { [PHASE_ANNOTATION]: 'switched', [SINCE_ANNOTATION]: stamp },
    };
  }
  if (phase === 'switched') {
    if (!waited) return undefined;
    return {
      phase: 'drop',
      data: { 'root-cert.pem': data['ca-cert.pem'] ?? '' },
      annotations: { [PHASE_ANNOTATION]: null, [SINCE_ANNOTATION]: null },
    };
  }
  if (annotations[ROTATE_ANNOTATION] !== 'true' && !expiresSoon(data['ca-cert.pem'] ?? '', now)) return undefined;
  const next = await makeRoot(now);
  return {
    phase: 'announce',
    data: {
      'root-cert.pem': `${[...splitPem(bundle), ...splitPem(next.certificate)].join('\n')}\n`,
      [NEXT_CERTIFICATE]: next.certificate,
      [NEXT_KEY]: next.key,
    },
    annotations: { [PHASE_ANNOTATION]: 'announced', [SINCE_ANNOTATION]: stamp, [ROTATE_ANNOTATION]: null },
  };
}

function expiresSoon(pem: string, now: Date): boolean {
  const certificate = new X509Certificate(pem);
  const [from, to] = [Date.parse(certificate.validFrom), Date.parse(certificate.validTo)];
  return to - now.getTime() < (to - from) * REMAINING;
}
