/** Authorization to the engine's policy. What is not understood is marked, never dropped: dropping it could allow more. */
import { istio } from '../../mesh/proto/generated.js';
import type { AttributeOf, EnginePolicy, EnginePolicyMatch, EngineStringMatch } from '../engine.js';
import { checkEnum, checkNotEmpty } from './checks.js';

type Match = istio.security.Match.$Properties;
/** Decoded with unknown fields kept. */
interface MayHoldUnknown {
  readonly $unknowns?: readonly Uint8Array[];
}
type List<T> = readonly T[] | null | undefined;

const { Scope, Action } = istio.security;
const SCOPES = {
  [Scope.GLOBAL]: 'global',
  [Scope.NAMESPACE]: 'namespace',
  [Scope.WORKLOAD_SELECTOR]: 'workload',
} as const;

const hasUnknown = (message: MayHoldUnknown): boolean => (message.$unknowns?.length ?? 0) > 0;

/** @throws ResourceError where the policy as a whole cannot be used: no name, unknown scope or action */
export function convertPolicy(policy: istio.security.Authorization.$Properties): EnginePolicy {
  const scope = checkEnum(policy.scope, 2, 'scope') as keyof typeof SCOPES;
  const action = checkEnum(policy.action, 1, 'action');
  return {
    name: checkNotEmpty(policy.name, 'name'),
    namespace: policy.namespace ?? '',
    scope: SCOPES[scope],
    action: action === Action.ALLOW ? 'allow' : 'deny',
    dryRun: policy.dryRun ?? false,
    rules: (policy.rules ?? []).map((rule) => {
      const clauses = (rule.clauses ?? []).map((clause) => {
        const matches = (clause.matches ?? []).map((match) =>
          convertMatch(match, hasUnknown(rule) || hasUnknown(clause)),
        );
        // A clause without matches always matches, which is not what one with an unknown field says.
        return matches.length === 0 && hasUnknown(clause) ? [malformedMatch()] : matches;
      });
      return hasUnknown(rule) ? [...clauses, [malformedMatch()]] : clauses;
    }),
  };
}

const malformedMatch = (): EnginePolicyMatch => convertMatch({}, true);

function convertMatch(match: Match, insideUnknown: boolean): EnginePolicyMatch {
  const state = { malformed: insideUnknown || hasUnknown(match) || (match.extensions?.length ?? 0) > 0 };
  const attribute = <In extends object | number, Out>(
    anyOf: List<In>,
    noneOf: List<In>,
    convert: (element: In) => Out | undefined,
  ): AttributeOf<Out> => {
    const list = (elements: List<In>): Out[] => {
      const out: Out[] = [];
      for (const element of elements ?? []) {
        const converted = convert(element);
        if (converted === undefined || (typeof element === 'object' && hasUnknown(element))) state.malformed = true;
        if (converted !== undefined) out.push(converted);
      }
      return out;
    };
    return { anyOf: list(anyOf), noneOf: list(noneOf) };
  };
  const converted = {
    namespaces: attribute(match.namespaces, match.notNamespaces, convertStringMatch),
    principals: attribute(match.principals, match.notPrincipals, convertStringMatch),
    sourceIps: attribute(match.sourceIps, match.notSourceIps, convertCidr),
    destinationIps: attribute(match.destinationIps, match.notDestinationIps, convertCidr),
    destinationPorts: attribute(match.destinationPorts, match.notDestinationPorts, convertPort),
    serviceAccounts: attribute(match.serviceAccounts, match.notServiceAccounts, convertServiceAccount),
  };
  return { ...converted, malformed: state.malformed };
}

function convertStringMatch(match: istio.security.StringMatch.$Properties): EngineStringMatch | undefined {
  // Absent members of the oneof are null or undefined; the empty string is a value.
  if (typeof match.exact === 'string') return { kind: 'exact', value: match.exact };
  if (typeof match.prefix === 'string') return { kind: 'prefix', value: match.prefix };
  if (typeof match.suffix === 'string') return { kind: 'suffix', value: match.suffix };
  if (match.presence) return { kind: 'presence', value: '' };
  return undefined;
}

function convertCidr(cidr: istio.security.Address.$Properties): { address: Uint8Array; length: number } | undefined {
  const address = cidr.address ?? new Uint8Array();
  const length = cidr.length ?? 0;
  if ((address.length !== 4 && address.length !== 16) || length > address.length * 8) return undefined;
  return { address: Uint8Array.from(address), length };
}

const convertPort = (port: number): number | undefined => (port >= 0 && port <= 65_535 ? port : undefined);

function convertServiceAccount(
  match: istio.security.ServiceAccountMatch.$Properties,
): { namespace: string; serviceAccount: string } | undefined {
  return { namespace: match.namespace ?? '', serviceAccount: match.serviceAccount ?? '' };
}
