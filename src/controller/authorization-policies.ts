/**
 * AuthorizationPolicy to L4 policy. What this layer cannot read or enforce never widens access: an ALLOW rule that holds
 * it does not match, a DENY rule matches more, and the user is told which and why.
 */
import { ROOT_NAMESPACE } from '../mesh/labels.js';
import { istio } from '../mesh/proto/generated.js';
import { parseCidr } from './ip.js';
import {
  type Attributes,
  type AuthorizationPolicy,
  type AuthorizationRule,
  keyOf,
  type Metadata,
  matchesLabels,
  namespaceOf,
  type Problem,
} from './objects.js';

type Authorization = istio.security.Authorization.$Properties;
type Match = istio.security.Match.$Properties;
type Rule = istio.security.Rule.$Properties;
type Clause = istio.security.Clause.$Properties;
const { Action, Scope } = istio.security;

/** Annotation of Istio: the policy is only to be logged. */
const DRY_RUN_ANNOTATION = 'istio.io/dry-run';

export interface ConvertedPolicy {
  /** `namespace/name`. */
  readonly key: string;
  readonly authorization: Authorization;
  /** Labels that a workload must have; undefined where the scope is the namespace or the mesh. */
  readonly labels: Readonly<Record<string, string>> | undefined;
  readonly namespace: string;
}

export interface Conversion {
  /** undefined where the policy is not for this layer. */
  readonly policy: ConvertedPolicy | undefined;
  readonly problems: readonly string[];
}

/** Converts one policy. An empty selector selects the whole namespace, as Istio's API says. */
export function convertAuthorizationPolicy(object: AuthorizationPolicy): Conversion {
  const namespace = namespaceOf(object);
  const spec = object.spec ?? {};
  const problems: string[] = [];
  if (spec.targetRef !== undefined || (spec.targetRefs?.length ?? 0) > 0) return { policy: undefined, problems };
  if (object.metadata.annotations?.[DRY_RUN_ANNOTATION] === 'true') {
    problems.push(`annotation ${DRY_RUN_ANNOTATION} is not supported; the policy is left out`);
    return { policy: undefined, problems };
  }
  let action: istio.security.Action;
  let rules: Rule[];
  switch (spec.action ?? 'ALLOW') {
    case 'ALLOW':
      action = Action.ALLOW;
      rules = convertRules(spec.rules, false, namespace, problems);
      break;
    case 'DENY':
      action = Action.DENY;
      rules = convertRules(spec.rules, true, namespace, problems);
      break;
    case 'AUDIT':
    case 'CUSTOM':
      problems.push(`action ${spec.action} is not supported at layer 4; the policy is left out`);
      return { policy: undefined, problems };
    default:
      problems.push(`action ${JSON.stringify(spec.action)} is none; the policy refuses everything it selects`);
      action = Action.ALLOW;
      rules = [];
  }
  let labels: Readonly<Record<string, string>> | undefined;
  const selector = spec.selector as Record<string, unknown> | undefined;
  const unknown = Object.keys(selector ?? {}).filter((field) => field !== 'matchLabels');
  if (unknown.length > 0) {
    problems.push(`selector.${unknown[0]} is not supported; the policy refuses everything in its scope`);
    action = Action.ALLOW;
    rules = [];
  } else if (Object.keys(spec.selector?.matchLabels ?? {}).length > 0) labels = spec.selector?.matchLabels;
  let scope = namespace === ROOT_NAMESPACE ? Scope.GLOBAL : Scope.NAMESPACE;
  if (labels !== undefined) scope = Scope.WORKLOAD_SELECTOR;
  const authorization: Authorization = { name: object.metadata.name, namespace, scope, action, rules };
  return { policy: { key: keyOf(object), authorization, labels, namespace }, problems };
}

/** Converts all policies. */
export function buildAuthorizationPolicies(
  objects: readonly AuthorizationPolicy[],
  convert: (object: AuthorizationPolicy) => Conversion = convertAuthorizationPolicy,
): {
  readonly policies: readonly ConvertedPolicy[];
  readonly problems: readonly Problem[];
} {
  const policies: ConvertedPolicy[] = [];
  const problems: Problem[] = [];
  for (const object of objects) {
    const conversion = convert(object);
    if (conversion.policy !== undefined) policies.push(conversion.policy);
    for (const message of conversion.problems) {
      problems.push({ object: `AuthorizationPolicy ${keyOf(object)}`, message, source: object });
    }
  }
  return { policies, problems };
}

/** Keys of the selecting policies that concern a workload: of its own namespace and of the root namespace. */
export function policiesOf(
  object: { readonly metadata: Metadata },
  selecting: ReadonlyMap<string, readonly ConvertedPolicy[]>,
): string[] {
  const namespace = namespaceOf(object);
  const keys: string[] = [];
  for (const scope of namespace === ROOT_NAMESPACE ? [namespace] : [namespace, ROOT_NAMESPACE]) {
    for (const { key, labels } of selecting.get(scope) ?? []) {
      if (labels !== undefined && matchesLabels(labels, object.metadata.labels)) keys.push(key);
    }
  }
  return keys;
}

function convertRules(
  rules: readonly AuthorizationRule[] | undefined,
  deny: boolean,
  namespace: string,
  problems: string[],
): Rule[] {
  if (rules === undefined || rules === null) return [];
  if (!Array.isArray(rules)) {
    problems.push(`rules is no list; ${deny ? 'everything is denied' : 'nothing is allowed'}`);
    return deny ? [{ clauses: [] }] : [];
  }
  const converted: Rule[] = [];
  for (const [index, rule] of rules.entries()) {
    const reader = new RuleReader(namespace);
    const clauses = reader.read(rule as AuthorizationRule | null);
    if (reader.findings.length > 0) {
      const effect = deny
        ? clauses.length === 0
          ? 'the rule denies everything'
          : 'the rule denies more than it says'
        : 'the rule allows nothing';
      problems.push(`rules[${index}]: ${reader.findings.join('; ')}; ${effect}`);
      if (!deny) continue;
    }
    converted.push({ clauses });
  }
  return converted;
}

type ListKey = Exclude<keyof Match, 'extensions' | '$unknowns'>;

/** Fields of a source, an operation and a `when` key that layer 4 can decide, and where they go. */
const SOURCE: Readonly<Record<string, ListKey>> = {
  principals: 'principals',
  notPrincipals: 'notPrincipals',
  namespaces: 'namespaces',
  notNamespaces: 'notNamespaces',
  serviceAccounts: 'serviceAccounts',
  notServiceAccounts: 'notServiceAccounts',
  ipBlocks: 'sourceIps',
  notIpBlocks: 'notSourceIps',
};
const OPERATION: Readonly<Record<string, ListKey>> = { ports: 'destinationPorts', notPorts: 'notDestinationPorts' };
const WHEN: Readonly<Record<string, readonly [ListKey, ListKey]>> = {
  'source.ip': ['sourceIps', 'notSourceIps'],
  'source.namespace': ['namespaces', 'notNamespaces'],
  'source.principal': ['principals', 'notPrincipals'],
  'destination.ip': ['destinationIps', 'notDestinationIps'],
  'destination.port': ['destinationPorts', 'notDestinationPorts'],
};

/**
 * Reads one rule. What cannot be decided here is left out, which makes the rule match more, and noted in `findings`:
 * that is right for DENY, and an ALLOW rule with findings is dropped by the caller.
 */
class RuleReader {
  readonly findings: string[] = [];
  readonly #namespace: string;

  constructor(namespace: string) {
    this.#namespace = namespace;
  }

  read(rule: AuthorizationRule | null): Clause[] {
    if (rule === null || typeof rule !== 'object') {
      this.findings.push('it is empty (write {} for a rule that matches everything)');
      return [];
    }
    for (const field of Object.keys(rule)) {
      if (field !== 'from' && field !== 'to' && field !== 'when') this.findings.push(`field ${field} is unknown`);
    }
    const clauses: Clause[] = [];
    const add = (matches: readonly (Match | undefined)[]): void => {
      if (matches.length === 0) return;
      // One alternative without constraints makes the whole clause true; as a message it would never match.
      const constrained = matches.filter((match) => match !== undefined);
      if (constrained.length === matches.length) clauses.push({ matches: constrained });
    };
    add(this.#list(rule.from, 'from').map((entry) => this.#attributes(entry?.source, SOURCE, 'from.source')));
    add(this.#list(rule.to, 'to').map((entry) => this.#attributes(entry?.operation, OPERATION, 'to.operation')));
    for (const condition of this.#list(rule.when, 'when')) {
      const target = WHEN[condition?.key ?? ''];
      const attributes: Attributes = { values: condition?.values, notValues: condition?.notValues };
      if (target === undefined) {
        this.findings.push(`when.key ${JSON.stringify(condition?.key)} cannot be decided at layer 4`);
        continue;
      }
      add([this.#attributes(attributes, { values: target[0], notValues: target[1] }, `when[${condition.key}]`)]);
    }
    return clauses;
  }

  #list<T>(value: readonly T[] | undefined, where: string): readonly T[] {
    if (value === undefined || value === null) return [];
    if (Array.isArray(value)) return value;
    this.findings.push(`${where} is no list`);
    return [];
  }

  /** A match, or undefined where nothing that can be decided here is left of it. */
  #attributes(
    attributes: Attributes | undefined,
    known: Readonly<Record<string, ListKey>>,
    where: string,
  ): Match | undefined {
    const match: Match = {};
    let fields = 0;
    for (const [field, values] of Object.entries(attributes ?? {})) {
      if (values === undefined || values === null || (Array.isArray(values) && values.length === 0)) continue;
      fields++;
      const target = known[field];
      if (target === undefined) {
        this.findings.push(`${where}.${field} cannot be decided at layer 4`);
        continue;
      }
      if (!Array.isArray(values)) {
        this.findings.push(`${where}.${field} is no list`);
        continue;
      }
      this.#assign(match, target, values, `${where}.${field}`);
    }
    if (fields === 0) this.findings.push(`${where} is empty`);
    return Object.keys(match).length > 0 ? match : undefined;
  }

  /** Sets one list of a match, unless one of its values cannot be read: then the list is left out. */
  #assign(match: Match, target: ListKey, values: readonly unknown[], where: string): void {
    const all = <T>(read: (text: string) => T | undefined): T[] | undefined => {
      const result: T[] = [];
      for (const value of values) {
        const parsed = typeof value === 'string' || typeof value === 'number' ? read(String(value)) : undefined;
        if (parsed === undefined) {
          this.findings.push(`${where} holds ${JSON.stringify(value)}, which is no such value`);
          return undefined;
        }
        result.push(parsed);
      }
      return result;
    };
    switch (target) {
      case 'principals':
      case 'notPrincipals':
      case 'namespaces':
      case 'notNamespaces': {
        const list = all(readStringMatch);
        if (list !== undefined) match[target] = list;
        return;
      }
      case 'serviceAccounts':
      case 'notServiceAccounts': {
        const list = all((text) => readServiceAccount(text, this.#namespace));
        if (list !== undefined) match[target] = list;
        return;
      }
      case 'sourceIps':
      case 'notSourceIps':
      case 'destinationIps':
      case 'notDestinationIps': {
        const list = all(parseCidr);
        if (list !== undefined) match[target] = list.map(({ address, length }) => ({ address, length }));
        return;
      }
      case 'destinationPorts':
      case 'notDestinationPorts': {
        const list = all(readPort);
        if (list !== undefined) match[target] = list;
        return;
      }
    }
  }
}

/** `*`, `*suffix`, `prefix*` or the exact text. A star elsewhere, or a URI, could never match and is a mistake. */
function readStringMatch(text: string): istio.security.StringMatch.$Properties | undefined {
  if (text === '*') return { presence: {} };
  if (text === '' || text.startsWith('spiffe://')) return undefined;
  if (text.startsWith('*')) return text.includes('*', 1) ? undefined : { suffix: text.slice(1) };
  if (text.endsWith('*')) return text.indexOf('*') < text.length - 1 ? undefined : { prefix: text.slice(0, -1) };
  return text.includes('*') ? undefined : { exact: text };
}

/** `namespace/name`, or `name` in the policy's own namespace. */
function readServiceAccount(
  text: string,
  ownNamespace: string,
): istio.security.ServiceAccountMatch.$Properties | undefined {
  const match = /^(?:([a-z0-9-]+)\/)?([a-z0-9.-]+)$/.exec(text);
  return match === null ? undefined : { namespace: match[1] ?? ownNamespace, serviceAccount: match[2] ?? '' };
}

function readPort(text: string): number | undefined {
  const port = /^\d{1,5}$/.test(text) ? Number(text) : 0;
  return port >= 1 && port <= 65_535 ? port : undefined;
}
