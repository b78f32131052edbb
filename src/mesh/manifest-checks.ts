/** Checks the fields of Kubernetes objects that we use: unknown fields are ignored, wrong types are reported by path. */
import { isIP } from 'node:net';

export type Path = readonly (string | number)[];
/** What a wrong type can be taken for without a doubt: the text as it was written, or the number that a text spells. */
export type Remedy = 'text' | 'number';
/** @param remedy given where the value may be taken for something else instead of refusing it */
export type Report = (path: Path, message: string, remedy?: Remedy) => void;
/** Looks at a value; says what is wrong by `report`. Values that are absent are not shown to a check. */
export type Check = (value: unknown, path: Path, report: Report) => void;

function nameOfType(value: unknown): string {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'a list' : typeof value === 'object' ? 'a mapping' : `a ${typeof value}`;
}

function typed(type: 'string' | 'number' | 'boolean', hint = ''): Check {
  return (value, path, report) => {
    if (typeof value !== type) report(path, `must be a ${type}, is ${nameOfType(value)}${hint}`);
  };
}

const string = typed('string');
/** What YAML easily takes for a number or a boolean; what was meant is the text that was written. */
const quoted: Check = (value, path, report) => {
  if (typeof value === 'string') return;
  const remedy = typeof value === 'number' || typeof value === 'boolean' ? 'text' : undefined;
  report(path, `must be a string, is ${nameOfType(value)}; put it in quotes`, remedy);
};
const boolean = typed('boolean');

const matching =
  (pattern: RegExp, what: string): Check =>
  (value, path, report) => {
    if (typeof value !== 'string' || !pattern.test(value)) report(path, `must be ${what}, is ${JSON.stringify(value)}`);
  };

/** Kubernetes' names: they become parts of file names and of SPIFFE identities, so nothing else gets in. */
const dnsName = matching(
  /^(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$/,
  'a name of lower case letters, digits, "-" and "."',
);
const emptyOrDnsName: Check = (value, path, report) => {
  if (value !== '') dnsName(value, path, report);
};
const dnsLabel = matching(
  /^(?=.{1,63}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?$/,
  'a name of lower case letters, digits and "-"',
);
const uid = matching(/^[A-Za-z0-9_-]{1,64}$/, 'a UID of letters, digits, "-" and "_"');

const port: Check = (value, path, report) => {
  if (typeof value === 'string' && /^[1-9]\d{0,4}$/.test(value) && Number(value) <= 65535) {
    report(path, `must be a number, is a string (${JSON.stringify(value)}); leave out the quotes`, 'number');
  } else if (!Number.isInteger(value) || Number(value) < 1 || Number(value) > 65535) {
    report(path, `must be a port from 1 to 65535, is ${JSON.stringify(value)}`);
  }
};

const address: Check = (value, path, report) => {
  if (typeof value !== 'string' || isIP(value) === 0 || value.includes('%')) {
    report(path, `must be an IP address, is ${JSON.stringify(value)}`);
  }
};
const emptyOrAddress: Check = (value, path, report) => {
  if (value !== '') address(value, path, report);
};

const numberOrString: Check = (value, path, report) => {
  if (typeof value === 'number') port(value, path, report);
  else string(value, path, report);
};

function isMapping(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A mapping with checks for the fields we know; those in `required` must be there. */
function mapping(fields: Readonly<Record<string, Check>>, required: readonly string[] = []): Check {
  return (value, path, report) => {
    if (!isMapping(value)) return report(path, `must be a mapping, is ${nameOfType(value)}`);
    for (const name of required) if (value[name] === undefined) report(path, `has no ${name}`);
    for (const [name, check] of Object.entries(fields)) {
      if (value[name] !== undefined) check(value[name], [...path, name], report);
    }
  };
}

/** A mapping of free names. */
function mapOf(check: Check): Check {
  return (value, path, report) => {
    if (!isMapping(value)) return report(path, `must be a mapping, is ${nameOfType(value)}`);
    for (const [name, entry] of Object.entries(value)) check(entry, [...path, name], report);
  };
}

function listOf(check: Check): Check {
  return (value, path, report) => {
    if (!Array.isArray(value)) return report(path, `must be a list, is ${nameOfType(value)}`);
    value.forEach((entry, index) => {
      check(entry, [...path, index], report);
    });
  };
}

const labels = mapOf(quoted);
const anything: Check = () => {};

function metadata(name: Check, namespaced: boolean): Check {
  return mapping(
    {
      name,
      ...(namespaced ? { namespace: dnsLabel } : {}),
      generateName: string,
      uid,
      labels,
      annotations: labels,
      // A YAML timestamp stays text with the core schema.
      creationTimestamp: string,
      deletionTimestamp: string,
      ownerReferences: listOf(mapping({ kind: string, name: string, controller: boolean }, ['kind', 'name'])),
    },
    ['name'],
  );
}

function object(spec: Readonly<Record<string, Check>>, name: Check = dnsName, namespaced = true): Check {
  return mapping({ metadata: metadata(name, namespaced), ...spec }, ['metadata']);
}

const containers = listOf(
  mapping({
    ports: listOf(mapping({ name: string, containerPort: port, protocol: string }, ['containerPort'])),
    restartPolicy: string,
  }),
);

const pod = object({
  spec: mapping({
    nodeName: emptyOrDnsName,
    serviceAccountName: emptyOrDnsName,
    hostNetwork: boolean,
    containers,
    initContainers: containers,
  }),
  status: mapping({
    phase: string,
    podIP: emptyOrAddress,
    podIPs: listOf(mapping({ ip: address }, ['ip'])),
    conditions: listOf(mapping({ type: string, status: quoted }, ['type', 'status'])),
  }),
});

const service = object({
  spec: mapping({
    type: string,
    clusterIP: string,
    clusterIPs: listOf(string),
    selector: labels,
    ports: listOf(
      mapping({ name: string, port, targetPort: numberOrString, protocol: string, appProtocol: string }, ['port']),
    ),
    ipFamilies: listOf(string),
    internalTrafficPolicy: string,
    trafficDistribution: string,
    publishNotReadyAddresses: boolean,
  }),
});

const endpointSlice = object({
  addressType: string,
  endpoints: listOf(
    mapping({
      addresses: listOf(string),
      conditions: mapping({ ready: boolean }),
      nodeName: string,
      zone: string,
      targetRef: mapping({ kind: string, name: string, namespace: string }),
    }),
  ),
  ports: listOf(mapping({ name: string, port, protocol: string })),
});

const selector = mapping({ matchLabels: labels });
const attributes = mapOf(listOf(quoted));

const authorizationPolicy = object({
  spec: mapping({
    selector,
    targetRef: anything,
    targetRefs: listOf(anything),
    action: string,
    rules: listOf(
      mapping({
        from: listOf(mapping({ source: attributes })),
        to: listOf(mapping({ operation: attributes })),
        when: listOf(mapping({ key: string, values: listOf(quoted), notValues: listOf(quoted) }, ['key'])),
      }),
    ),
  }),
});

const mode = mapping({ mode: string });
const peerAuthentication = object({ spec: mapping({ selector, mtls: mode, portLevelMtls: mapOf(mode) }) });

/** What we read, by `group/Kind`; the core group is empty. The version within a group is not looked at. */
export const CHECKS: Readonly<Record<string, Check | undefined>> = {
  '/Namespace': object({}, dnsLabel, false),
  '/Node': object({}, dnsName, false),
  '/Pod': pod,
  '/Service': service,
  'discovery.k8s.io/EndpointSlice': endpointSlice,
  'security.istio.io/AuthorizationPolicy': authorizationPolicy,
  'security.istio.io/PeerAuthentication': peerAuthentication,
};

/** Kinds that protect something, or whose name no other group has: told about where they are of a group that we do not read. */
const TELLTALE: readonly string[] = ['AuthorizationPolicy', 'PeerAuthentication', 'EndpointSlice'];

/** Why an object that is not read should have been, maybe; undefined where it is none of our business. */
export function explainUnread(group: string, kind: string): string | undefined {
  if (TELLTALE.includes(kind)) {
    const known = Object.keys(CHECKS).find((name) => name.endsWith(`/${kind}`));
    return `${kind} of group ${JSON.stringify(group)} is not read and has no effect; ours is ${known}`;
  }
  if (group === 'security.istio.io') return `${kind} is not supported and has no effect`;
  return undefined;
}

/** Whether a text that cannot be read as YAML may have held what protects something. */
export function mayHoldPolicy(text: string): boolean {
  return /security\.istio\.io|AuthorizationPolic|PeerAuthentic/i.test(text);
}

/** `metadata.labels` as one reads it; list indices in brackets. */
export function formatPath(path: Path): string {
  return path.map((step, index) => (typeof step === 'number' ? `[${step}]` : index === 0 ? step : `.${step}`)).join('');
}
