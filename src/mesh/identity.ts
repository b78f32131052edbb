/** SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. */

export interface Identity {
  readonly trustDomain: string;
  readonly namespace: string;
  readonly serviceAccount: string;
}

/** Trust domain of a workload that names none (WDS field `trust_domain` empty). */
export const DEFAULT_TRUST_DOMAIN = 'cluster.local';

/** The SPIFFE URI of an identity. */
export function formatIdentity(identity: Identity): string {
  return `spiffe://${identity.trustDomain}/ns/${identity.namespace}/sa/${identity.serviceAccount}`;
}

/**
 * Reads a SPIFFE URI of exactly the shape above.
 * @returns the identity, or undefined where the text has any other shape (segments may be empty, as in Istio).
 */
export function parseIdentity(uri: string): Identity | undefined {
  if (!uri.startsWith('spiffe://')) return undefined;
  const [trustDomain, ns, namespace, sa, serviceAccount, ...rest] = uri.slice('spiffe://'.length).split('/');
  if (ns !== 'ns' || sa !== 'sa' || rest.length > 0) return undefined;
  if (trustDomain === undefined || namespace === undefined || serviceAccount === undefined) return undefined;
  return { trustDomain, namespace, serviceAccount };
}
