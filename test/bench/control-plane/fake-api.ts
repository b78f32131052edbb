/**
 * A Kubernetes API of a large cluster, as a process: lists in pages, watches, single objects, TokenReview. Pods are made as
 * they are read, as large as real ones. Arguments: nodes, pods, certificate, key. Says its port on standard output;
 * `touch POD` on standard input changes a pod, `policy` adds an AuthorizationPolicy.
 */
import { readFileSync } from 'node:fs';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { createServer } from 'node:https';
import { createInterface } from 'node:readline';

const [nodes = 0, pods = 0] = process.argv.slice(2, 4).map(Number);
const [, , , , certificate = '', key = ''] = process.argv;
const NAMESPACES = 50;
const PODS_PER_SERVICE = 50;
const PROXY_NAMESPACE = 'istio-system';

let version = 1_000_000;
/** When a pod was changed, in milliseconds since the epoch; it travels in a label. */
const touched = new Map<number, number>();
const watchers = new Map<string, Set<{ readonly response: ServerResponse; readonly fields: string }>>();
/** What was told, by path: a watch that ended in silence begins again at the version that it knows. */
const told = new Map<
  string,
  { readonly version: number; readonly line: string; readonly name: string | undefined }[]
>();
const stored = new Map<string, Map<string, Record<string, unknown>>>();

const now = (): number => performance.timeOrigin + performance.now();
const namespaceOf = (pod: number): string => `team-${Math.floor(pod / PODS_PER_SERVICE) % NAMESPACES}`;
const serviceOf = (pod: number): string => `service-${Math.floor(pod / PODS_PER_SERVICE)}`;
const uid = (kind: number, index: number): string =>
  `${kind.toString(16).padStart(8, '0')}-0000-4000-8000-${index.toString(16).padStart(12, '0')}`;
/** Managed fields and the like: what makes a real pod some 4 KB of JSON. */
const ballast = Array.from({ length: 3 }, (_, index) => ({
  manager: `kubelet-${index}`,
  operation: 'Update',
  apiVersion: 'v1',
  time: '2026-11-01T00:00:00Z',
  fieldsType: 'FieldsV1',
  fieldsV1: Object.fromEntries(
    Array.from({ length: 20 }, (_, n) => [`f:some-field-of-a-pod-${n}`, { '.': {}, 'f:a': {} }]),
  ),
}));

function pod(index: number): object {
  const service = serviceOf(index);
  const hash = '7d4b9c6f5d';
  const ip = `10.${64 + (index >> 16)}.${(index >> 8) & 255}.${index & 255}`;
  const stamp = touched.get(index);
  return {
    metadata: {
      name: `${service}-${hash}-${index.toString(36).padStart(5, 'x')}`,
      generateName: `${service}-${hash}-`,
      namespace: namespaceOf(index),
      uid: uid(1, index),
      resourceVersion: String(stamp === undefined ? index + 1 : version),
      creationTimestamp: '2026-11-01T00:00:00Z',
      labels: {
        app: service,
        'pod-template-hash': hash,
        'app.kubernetes.io/version': stamp === undefined ? 'v1' : `at-${stamp.toFixed(3)}`,
        'app.kubernetes.io/part-of': 'shop',
      },
      annotations: {
        'ambient.istio.io/redirection': 'enabled',
        'kubectl.kubernetes.io/restartedAt': '2026-11-01T00:00:00Z',
      },
      ownerReferences: [
        { apiVersion: 'apps/v1', kind: 'ReplicaSet', name: `${service}-${hash}`, uid: uid(2, index), controller: true },
      ],
      managedFields: ballast,
    },
    spec: {
      nodeName: `node-${index % nodes}`,
      serviceAccountName: service,
      containers: [
        {
          name: 'main',
          image: 'registry.example/shop/service:v1',
          ports: [{ name: 'http', containerPort: 8080, protocol: 'TCP' }],
          env: Array.from({ length: 10 }, (_, n) => ({ name: `VARIABLE_${n}`, value: `value-of-variable-${n}` })),
        },
      ],
    },
    status: {
      phase: 'Running',
      podIP: ip,
      podIPs: [{ ip }],
      conditions: ['Initialized', 'Ready', 'ContainersReady', 'PodScheduled'].map((type) => ({ type, status: 'True' })),
    },
  };
}

const proxyPod = (node: number): object => ({
  metadata: { name: `proxy-${node}`, namespace: PROXY_NAMESPACE, uid: uid(3, node), resourceVersion: '1' },
  spec: { nodeName: `node-${node}`, serviceAccountName: 'ebbtide-proxy', hostNetwork: true },
  status: {
    phase: 'Running',
    podIP: `192.168.${node >> 8}.${node & 255}`,
    conditions: [{ type: 'Ready', status: 'True' }],
  },
});

const service = (index: number): object => ({
  metadata: { name: `service-${index}`, namespace: namespaceOf(index * PODS_PER_SERVICE), resourceVersion: '1' },
  spec: {
    selector: { app: `service-${index}` },
    clusterIP: `10.32.${index >> 8}.${index & 255}`,
    clusterIPs: [`10.32.${index >> 8}.${index & 255}`],
    ports: [{ name: 'http', port: 80, targetPort: 'http', protocol: 'TCP' }],
  },
});

const named = (name: string, labels: object = {}): object => ({ metadata: { name, resourceVersion: '1', labels } });

/** What a path lists: how many, and each. */
const LISTS: Readonly<Record<string, { readonly count: number; readonly make: (index: number) => object }>> = {
  '/api/v1/namespaces': {
    count: NAMESPACES + 1,
    make: (index) =>
      named(index === NAMESPACES ? PROXY_NAMESPACE : `team-${index}`, { 'istio.io/dataplane-mode': 'ambient' }),
  },
  '/api/v1/nodes': {
    count: nodes,
    make: (index) =>
      named(`node-${index}`, { 'topology.kubernetes.io/region': 'r', 'topology.kubernetes.io/zone': `z${index % 3}` }),
  },
  '/api/v1/pods': { count: pods + nodes, make: (index) => (index < pods ? pod(index) : proxyPod(index - pods)) },
  '/api/v1/services': { count: Math.ceil(pods / PODS_PER_SERVICE), make: service },
  '/apis/discovery.k8s.io/v1/endpointslices': { count: 0, make: () => ({}) },
};

function send(response: ServerResponse, code: number, body: object): void {
  response.writeHead(code, { 'Content-Type': 'application/json' });
  response.end(JSON.stringify(body));
}

function tell(path: string, type: string, object: object): void {
  const line = `${JSON.stringify({ type, object })}\n`;
  const name = (object as { metadata?: { name?: string } }).metadata?.name;
  const events = told.get(path) ?? [];
  told.set(path, events);
  events.push({ version, line, name });
  for (const { response, fields } of watchers.get(path) ?? []) if (concerns(fields, name)) response.write(line);
}

const concerns = (fields: string, name: string | undefined): boolean =>
  !fields.startsWith('metadata.name=') || fields === `metadata.name=${name}`;

/** Objects that are written: Secrets, ConfigMaps, the Lease, policies. By the path of their kind, all namespaces together. */
function kindOf(path: string): { readonly all: string; readonly key: string; readonly name: string } | undefined {
  const match = /^(\/api\/v1|\/apis\/[^/]+\/v1)\/namespaces\/([^/]+)\/([^/]+)(?:\/([^/]+))?/.exec(path);
  if (match === null) return undefined;
  const [, root = '', namespace = '', plural = '', name = ''] = match;
  return { all: `${root}/${plural}`, key: `${namespace}/${name}`, name };
}

function write(path: string, method: string, body: Record<string, unknown>): { code: number; object: object } {
  const kind = kindOf(path);
  if (kind === undefined) return { code: 404, object: { reason: 'NotFound', message: path } };
  const objects = stored.get(kind.all) ?? new Map<string, Record<string, unknown>>();
  stored.set(kind.all, objects);
  const metadata = (body['metadata'] ?? {}) as Record<string, unknown>;
  const namespace = kind.key.split('/')[0] ?? '';
  const key = `${namespace}/${kind.name || String(metadata['name'])}`;
  const before = objects.get(key);
  if (method === 'POST' && before !== undefined)
    return { code: 409, object: { reason: 'AlreadyExists', message: key } };
  const object = {
    ...before,
    ...body,
    metadata: { ...(before?.['metadata'] as object), ...metadata, namespace, resourceVersion: String(++version) },
  };
  objects.set(key, object);
  for (const listed of [
    kind.all,
    path.slice(0, path.lastIndexOf(kind.all.slice(kind.all.lastIndexOf('/')))) +
      kind.all.slice(kind.all.lastIndexOf('/')),
  ]) {
    tell(listed, before === undefined ? 'ADDED' : 'MODIFIED', object);
  }
  return { code: 200, object };
}

function review(body: { spec?: { token?: string } }): object {
  const node = /^node-(\d+)$/.exec(body.spec?.token ?? '')?.[1];
  if (node === undefined) return { status: { authenticated: false } };
  return {
    status: {
      authenticated: true,
      audiences: ['istio-ca'],
      user: {
        username: `system:serviceaccount:${PROXY_NAMESPACE}:ebbtide-proxy`,
        groups: ['system:serviceaccounts'],
        extra: {
          'authentication.kubernetes.io/pod-name': [`proxy-${node}`],
          'authentication.kubernetes.io/pod-uid': [uid(3, Number(node))],
        },
      },
    },
  };
}

function list(url: URL, response: ServerResponse): void {
  const fields = url.searchParams.get('fieldSelector') ?? '';
  if (url.searchParams.get('watch') === 'true') {
    const set = watchers.get(url.pathname) ?? new Set();
    watchers.set(url.pathname, set);
    const watcher = { response, fields };
    set.add(watcher);
    response.writeHead(200, { 'Content-Type': 'application/json' });
    response.flushHeaders();
    const from = Number(url.searchParams.get('resourceVersion') ?? version);
    for (const event of told.get(url.pathname) ?? []) {
      if (event.version > from && concerns(fields, event.name)) response.write(event.line);
    }
    response.on('close', () => set.delete(watcher));
    return;
  }
  const limit = Number(url.searchParams.get('limit') ?? 500);
  const start = Number(url.searchParams.get('continue') ?? 0);
  const source = LISTS[url.pathname];
  const kind = kindOf(url.pathname);
  const written = [...(stored.get(kind?.all ?? url.pathname)?.values() ?? [])].filter(
    (object) => fields === '' || fields === `metadata.name=${(object['metadata'] as { name: string }).name}`,
  );
  const items: object[] = source === undefined ? written : [];
  if (source !== undefined) {
    for (let index = start; index < Math.min(start + limit, source.count); index++) items.push(source.make(index));
  }
  const more = source !== undefined && start + limit < source.count ? { continue: String(start + limit) } : {};
  send(response, 200, { metadata: { resourceVersion: String(version), ...more }, items });
}

async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const url = new URL(request.url ?? '/', 'https://localhost');
  let text = '';
  for await (const chunk of request) text += chunk;
  const body = (text === '' ? {} : JSON.parse(text)) as Record<string, unknown>;
  if (request.method !== 'GET') {
    if (url.pathname.endsWith('/tokenreviews')) return send(response, 201, review(body));
    const { code, object } = write(url.pathname, request.method ?? '', body);
    return send(response, code, object);
  }
  const kind = kindOf(url.pathname);
  if (kind === undefined || kind.name === '') return list(url, response);
  const object = stored.get(kind.all)?.get(kind.key);
  return object === undefined
    ? send(response, 404, { reason: 'NotFound', message: url.pathname })
    : send(response, 200, object);
}

const server = createServer({ cert: readFileSync(certificate), key: readFileSync(key) }, (request, response) => {
  handle(request, response).catch((error: unknown) => send(response, 500, { message: String(error) }));
});
server.listen(0, '127.0.0.1', () => {
  const address = server.address();
  process.stdout.write(`${typeof address === 'object' && address !== null ? address.port : 0}\n`);
});
createInterface(process.stdin).on('line', (line) => {
  const [command, argument] = line.split(' ');
  if (command === 'touch') {
    const index = Number(argument);
    version++;
    touched.set(index, now());
    tell('/api/v1/pods', 'MODIFIED', pod(index));
  } else if (command === 'policy') {
    // Its own time travels in its name.
    const name = `at-${now().toFixed(3)}`;
    write('/apis/security.istio.io/v1/namespaces/team-1/authorizationpolicies', 'POST', {
      metadata: { name },
      spec: { action: 'DENY', rules: [{ from: [{ source: { namespaces: ['evil'] } }] }] },
    });
  }
});
process.stdin.on('end', () => process.exit(0));
