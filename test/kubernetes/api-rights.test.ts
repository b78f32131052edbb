/** The controller as a pod would run it: its process, its own token, the chart's rights and definitions, and no more. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { waitFor } from '../../src/lab/wait.js';
import { openApi } from '../../src/mesh/api/index.js';
import { CHART, findHelm, parseObjects, render } from '../unit/chart-rendered.js';
import { type ApiServer, clusterBinaries, startApiServer } from './lib/api-server.js';
import { grantRights, makeNamespace, makeNode, makeServiceAccount, pathOf, putCustom } from './lib/cluster-objects.js';

const NAMESPACE = 'ebbtide-system';
const ACCOUNT = 'ebbtide-controller';
const MAIN = join(import.meta.dirname, '../../dist/main.js');
const WAIT = { timeoutMs: 60_000 };

let server: ApiServer;
let child: ChildProcess | undefined;
let directory: string;
const lines: Record<string, unknown>[] = [];
const events = (name: string): Record<string, unknown>[] => lines.filter(({ event }) => event === name);

beforeAll(async () => {
  clusterBinaries();
  const helm = findHelm();
  if (helm === undefined) throw new Error('no helm: test/kubernetes/binaries.sh builds it');
  server = await startApiServer();
  for (const file of readdirSync(join(CHART, 'crds'))) {
    for (const definition of parseObjects(readFileSync(join(CHART, 'crds', file), 'utf8'))) {
      await server.api.request('POST', '/apis/apiextensions.k8s.io/v1/customresourcedefinitions', { body: definition });
    }
  }
  await makeNamespace(server, NAMESPACE);
  await makeServiceAccount(server, NAMESPACE, ACCOUNT);
  await grantRights(server, render(helm, [], NAMESPACE));
  await makeNode(server, 'n1');
  await makeNamespace(server, 'shop');
  directory = server.serviceAccountDirectory(await server.token(NAMESPACE, ACCOUNT), NAMESPACE);
});

afterAll(async () => {
  if (child?.exitCode === null && child.signalCode === null) {
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  await server?.close();
});

it('reads, leads, publishes the root and writes status with what the chart grants, and complains of nothing', async () => {
  const argv = [MAIN, 'controller', '--service-account', directory, '--listen', '127.0.0.1:0'];
  const env = { ...process.env, KUBERNETES_SERVICE_HOST: '127.0.0.1', KUBERNETES_SERVICE_PORT: String(server.port) };
  for (const name of ['KUBECONFIG', 'EBBTIDE_MANIFESTS', 'POD_NAMESPACE', 'NODE_OPTIONS'])
    delete (env as NodeJS.ProcessEnv)[name];
  const started = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'inherit'], env });
  child = started;
  createInterface(started.stdout).on('line', (line) => lines.push(JSON.parse(line)));
  await waitFor('it to lead', () => events('leading').length > 0, {
    ...WAIT,
    hint: () => JSON.stringify(lines.slice(-3)),
  });
  await waitFor('the root to be published', () => events('root_published').length > 0, WAIT);
  await putCustom(server, 'AuthorizationPolicy', 'shop', 'p', {
    action: 'DENY',
    rules: [{ from: [{ source: { namespaces: ['x'] } }] }],
  });
  await putCustom(server, 'PeerAuthentication', 'shop', 'p', { mtls: { mode: 'STRICT' } });
  for (const kind of ['AuthorizationPolicy', 'PeerAuthentication'] as const) {
    await waitFor(
      `the status of ${kind}`,
      async () => {
        const object = await server.api.request<{ status?: { conditions?: { type: string; status: string }[] } }>(
          'GET',
          pathOf(kind, 'shop', 'p'),
        );
        return object.status?.conditions?.some(
          ({ type, status }) => type === 'ebbtide.dev/Enforced' && status === 'True',
        );
      },
      { ...WAIT, hint: () => JSON.stringify(events('status_failed').slice(-1)) },
    );
  }
  // What is changed by another hand has to be seen by a watch that is restricted to a name.
  const path = '/api/v1/namespaces/shop/configmaps/istio-ca-root-cert';
  await server.api.request('PATCH', path, { body: { data: { 'root-cert.pem': 'evil' } } });
  await waitFor(
    'the repair',
    async () =>
      (await server.api.request<{ data: Record<string, string> }>('GET', path)).data['root-cert.pem'] !== 'evil',
    WAIT,
  );
  const rotate = { metadata: { annotations: { 'ebbtide.dev/rotate-root': 'true' } } };
  await server.api.request('PATCH', `/api/v1/namespaces/${NAMESPACE}/secrets/istio-ca-secret`, { body: rotate });
  await waitFor('a step of a rotation', () => events('root_rotation').length > 0, WAIT);
  await sleep(2500);
  expect(lines.filter(({ level }) => level !== 'info' && level !== 'debug')).toEqual([]);
  started.kill('SIGTERM');
  await once(started, 'exit');
  expect(started.exitCode).toBe(0);
});

it('may not read what is none of its business', async () => {
  const api = openApi({ server: server.url, serviceAccountDirectory: directory });
  await server.api.request('POST', '/api/v1/namespaces/shop/secrets', { body: { metadata: { name: 'secret' } } });
  await server.api.request('POST', '/api/v1/namespaces/shop/configmaps', { body: { metadata: { name: 'settings' } } });
  for (const path of [
    '/api/v1/secrets',
    '/api/v1/namespaces/shop/secrets/secret',
    `/api/v1/namespaces/${NAMESPACE}/secrets`,
    '/api/v1/configmaps',
    '/api/v1/namespaces/shop/configmaps/settings',
  ]) {
    await expect(api.request('GET', path), path).rejects.toMatchObject({ status: 403 });
  }
  api.close();
});
