/**
 * PeerAuthentication to L4 policy: mode(port) = port's ?? workload's ?? namespace's ?? mesh's ?? PERMISSIVE, and what is
 * STRICT becomes a DENY of everything without an identity. DISABLE is PERMISSIVE at this layer.
 */
import { ROOT_NAMESPACE } from '../mesh/labels.js';
import { istio } from '../mesh/proto/generated.js';
import {
  byAge,
  keyOf,
  matchesLabels,
  namespaceOf,
  type PeerAuthentication,
  type Pod,
  type Problem,
} from './objects.js';

type Authorization = istio.security.Authorization.$Properties;
type Match = istio.security.Match.$Properties;
const { Action, Scope } = istio.security;

/** Name of the policy that refuses whoever has no identity, as Istio names it; in the root namespace. */
const STATIC_STRICT_NAME = 'istio_converted_static_strict';
export const STATIC_STRICT_KEY = `${ROOT_NAMESPACE}/${STATIC_STRICT_NAME}`;

type Mode = 'STRICT' | 'PERMISSIVE';

export interface PeerAuthenticationResult {
  /** Policies to be served, by `namespace/name`. */
  readonly policies: ReadonlyMap<string, Authorization>;
  readonly problems: readonly Problem[];
  /** Key of the policy that the pod must list, or undefined where plaintext may reach all its ports. */
  policyOf(pod: Pod): string | undefined;
}

/** Converts all PeerAuthentications. */
export function buildPeerAuthentications(objects: readonly PeerAuthentication[]): PeerAuthenticationResult {
  const policies = new Map<string, Authorization>();
  const problems: Problem[] = [];
  const report = (object: PeerAuthentication, message: string): void => {
    problems.push({ object: `PeerAuthentication ${keyOf(object)}`, message, source: object });
  };
  /** undefined is UNSET: inherit. A mode that nobody knows is taken for the strictest. */
  const modeOf = (object: PeerAuthentication, mode: string | undefined, where: string): Mode | undefined => {
    switch (mode ?? 'UNSET') {
      case 'UNSET':
        return undefined;
      case 'STRICT':
        return 'STRICT';
      case 'PERMISSIVE':
      case 'DISABLE':
        return 'PERMISSIVE';
      default:
        report(object, `${where} ${JSON.stringify(mode)} is no mode; it is taken for STRICT`);
        return 'STRICT';
    }
  };

  const wide = new Map<string, Mode | undefined>();
  const selecting = new Map<string, { object: PeerAuthentication; labels: Record<string, string>; key?: string }[]>();
  for (const object of [...objects].sort(byAge)) {
    const namespace = namespaceOf(object);
    const labels = object.spec?.selector?.matchLabels ?? {};
    if (Object.keys(labels).length > 0) {
      if (namespace === ROOT_NAMESPACE) {
        report(object, 'a selector has no meaning in the root namespace; the object is ignored, as Istio does');
        continue;
      }
      const group = selecting.get(namespace) ?? [];
      selecting.set(namespace, group);
      group.push({ object, labels: { ...labels } });
      continue;
    }
    if (wide.has(namespace)) {
      report(object, 'an older one already covers the whole namespace; this one is ignored');
      continue;
    }
    if (object.spec?.portLevelMtls !== undefined) {
      report(object, 'portLevelMtls has no meaning without a selector; it is ignored, as Istio does');
    }
    wide.set(namespace, modeOf(object, object.spec?.mtls?.mode, 'mtls.mode'));
  }

  const inherited = (namespace: string): Mode => wide.get(namespace) ?? wide.get(ROOT_NAMESPACE) ?? 'PERMISSIVE';
  for (const [namespace, group] of selecting) {
    for (const entry of group) {
      const { object } = entry;
      let base = modeOf(object, object.spec?.mtls?.mode, 'mtls.mode') ?? inherited(namespace);
      const exceptions: number[] = [];
      for (const [text, { mode }] of Object.entries(object.spec?.portLevelMtls ?? {})) {
        const port = /^\d{1,5}$/.test(text) ? Number(text) : 0;
        const wanted = modeOf(object, mode, `portLevelMtls[${text}].mode`);
        if (port < 1 || port > 65_535) {
          const strict = wanted === 'STRICT';
          const effect = strict ? 'all ports are STRICT' : 'it is ignored';
          report(object, `portLevelMtls[${JSON.stringify(text)}] is no port; ${effect}`);
          if (strict) base = 'STRICT';
        } else if (wanted !== undefined && wanted !== base) exceptions.push(port);
      }
      // Above, a bad port may have made the base STRICT after a port was compared with it: those need no exception.
      const ports = exceptions.filter((port) => modeAt(object, port) !== base).sort((a, b) => a - b);
      const key = policyKey(object, base, ports, policies);
      if (key !== undefined) entry.key = key;
    }
  }
  if (objects.length > 0) policies.set(STATIC_STRICT_KEY, strictPolicy(ROOT_NAMESPACE, STATIC_STRICT_NAME, {}));

  return {
    policies,
    problems,
    policyOf(pod) {
      const namespace = namespaceOf(pod);
      for (const { labels, key } of selecting.get(namespace) ?? []) {
        if (matchesLabels(labels, pod.metadata.labels)) return key;
      }
      return inherited(namespace) === 'STRICT' ? STATIC_STRICT_KEY : undefined;
    },
  };
}

function modeAt(object: PeerAuthentication, port: number): Mode {
  const mode = object.spec?.portLevelMtls?.[String(port)]?.mode;
  return mode === 'PERMISSIVE' || mode === 'DISABLE' ? 'PERMISSIVE' : 'STRICT';
}

function policyKey(
  object: PeerAuthentication,
  base: Mode,
  exceptions: readonly number[],
  policies: Map<string, Authorization>,
): string | undefined {
  if (exceptions.length === 0) return base === 'STRICT' ? STATIC_STRICT_KEY : undefined;
  const namespace = namespaceOf(object);
  const name = `converted_peer_authentication_${object.metadata.name}`;
  const ports: Match =
    base === 'STRICT' ? { notDestinationPorts: [...exceptions] } : { destinationPorts: [...exceptions] };
  const key = `${namespace}/${name}`;
  policies.set(key, strictPolicy(namespace, name, ports));
  return key;
}

/** DENY of callers without identity, on the ports given: fields of one match are ANDed. */
function strictPolicy(namespace: string, name: string, ports: Match): Authorization {
  const match: Match = { notPrincipals: [{ presence: {} }], ...ports };
  return {
    name,
    namespace,
    scope: Scope.WORKLOAD_SELECTOR,
    action: Action.DENY,
    rules: [{ clauses: [{ matches: [match] }] }],
  };
}
