/** Every environment name that `ebbtide proxy` reads, with its default and meaning. Names and meanings are ztunnel's. */

export interface Variable {
  /** A name, or a prefix that ends in `*`. */
  readonly name: string;
  /** As a person would write it; what follows from other things is told in words in parentheses. */
  readonly fallback: string;
  readonly text: string;
}

export const VARIABLES = [
  { name: 'NODE_NAME', fallback: '', text: 'name of the node; required' },
  {
    name: 'XDS_ADDRESS',
    fallback: '(istiod.istio-system.svc:15012 in Kubernetes, localhost:15012 elsewhere)',
    text: 'controller, HOST:PORT or https://HOST:PORT',
  },
  { name: 'CA_ADDRESS', fallback: '(as XDS_ADDRESS)', text: 'certificate authority, HOST:PORT or https://HOST:PORT' },
  {
    name: 'XDS_ROOT_CA',
    fallback: './var/run/secrets/istio/root-cert.pem',
    text: "root of the controller's certificate: a path, PEM text, or SYSTEM",
  },
  {
    name: 'CA_ROOT_CA',
    fallback: './var/run/secrets/istio/root-cert.pem',
    text: "root of the certificate authority's certificate: a path, PEM text, or SYSTEM",
  },
  { name: 'ALT_XDS_HOSTNAME', fallback: '', text: "second name that the controller's certificate may hold" },
  { name: 'ALT_CA_HOSTNAME', fallback: '', text: "second name that the certificate authority's certificate may hold" },
  {
    name: 'AUTH_TOKEN',
    fallback: './var/run/secrets/tokens/istio-token',
    text: 'bearer token: a path (read again at each use) or the token itself',
  },
  { name: 'XDS_HEADER_*', fallback: '', text: 'metadata added to xDS calls' },
  { name: 'CA_HEADER_*', fallback: '', text: 'metadata added to certificate calls' },
  { name: 'INPOD_UDS', fallback: '/var/run/ztunnel/ztunnel.sock', text: "the node agent's ZDS socket" },
  { name: 'CLUSTER_ID', fallback: 'Kubernetes', text: 'name of the cluster (ISTIO_META_CLUSTER_ID goes first)' },
  { name: 'CLUSTER_DOMAIN', fallback: 'cluster.local', text: 'DNS domain of Services' },
  { name: 'NETWORK', fallback: '', text: 'name of the network the node is on' },
  {
    name: 'TRUST_DOMAIN',
    fallback: 'cluster.local',
    text: 'trust domain of pods whose workload has not been received yet',
  },
  { name: 'SECRET_TTL', fallback: '24h', text: 'lifetime that is asked for certificates' },
  { name: 'POD_NAME', fallback: '', text: "the proxy's own pod, told to the controller" },
  { name: 'POD_NAMESPACE', fallback: '', text: "namespace of the proxy's own pod" },
  { name: 'INSTANCE_IP', fallback: '1.1.1.1', text: "the proxy's own address, told to the controller" },
  { name: 'ISTIO_META_*', fallback: '', text: 'node metadata told to the controller' },
  { name: 'ISTIO_METAJSON_*', fallback: '', text: 'node metadata told to the controller, values in JSON' },
  {
    name: 'HTTP2_STREAM_WINDOW_SIZE',
    fallback: '4194304',
    text: 'most bytes in flight on one HBONE stream; it begins with 65535 and grows while the application reads',
  },
  { name: 'HTTP2_CONNECTION_WINDOW_SIZE', fallback: '16777216', text: 'the same for a whole HBONE connection' },
  { name: 'HTTP2_FRAME_SIZE', fallback: '1048576', text: 'largest HTTP/2 frame' },
  { name: 'POOL_MAX_STREAMS_PER_CONNECTION', fallback: '100', text: 'streams on one HBONE connection' },
  { name: 'POOL_UNUSED_RELEASE_TIMEOUT', fallback: '5m', text: 'how long an unused HBONE connection is kept' },
  {
    name: 'ZTUNNEL_WORKER_THREADS',
    fallback: '0',
    text: 'worker threads: a number, N% of the processors, 0 for one a processor',
  },
  {
    name: 'CONNECTION_TERMINATION_DEADLINE',
    fallback: '(from TERMINATION_GRACE_PERIOD_SECONDS)',
    text: 'how long open connections may go on when the proxy stops',
  },
  {
    name: 'TERMINATION_GRACE_PERIOD_SECONDS',
    fallback: '(5 s deadline)',
    text: "the pod's grace period: the deadline is 5 s less where it is over 10 s, else 1 s less",
  },
  { name: 'EBBTIDE_ACCESS_LOG', fallback: 'all', text: 'access log: all, failures or off' },
  { name: 'EBBTIDE_LOG', fallback: 'info', text: 'log level: trace, debug, info, warn, error or silent' },
  { name: 'EBBTIDE_ADMIN_PORT', fallback: '15000', text: 'admin interface, on 127.0.0.1' },
  { name: 'EBBTIDE_METRICS_PORT', fallback: '15020', text: 'Prometheus metrics' },
  { name: 'EBBTIDE_READINESS_PORT', fallback: '15021', text: 'readiness' },
] as const satisfies readonly Variable[];

export type VariableName = (typeof VARIABLES)[number]['name'];

const FALLBACKS: ReadonlyMap<string, string> = new Map(VARIABLES.map(({ name, fallback }) => [name, fallback]));

/** Default of a variable, "" where it only can be told in words. */
export function fallbackOf(name: VariableName): string {
  const fallback = FALLBACKS.get(name) ?? '';
  return fallback.startsWith('(') ? '' : fallback;
}

/** The table for `--help`. */
export function describeVariables(): string {
  const width = Math.max(...VARIABLES.map(({ name }) => name.length));
  const lines = VARIABLES.map(({ name, fallback, text }) => {
    const told = fallback === '' ? '' : ` [${fallback.replace(/^\((.*)\)$/, '$1')}]`;
    return `  ${name.padEnd(width)}  ${text}${told}`;
  });
  return ['', 'Environment:', ...lines, ''].join('\n');
}
