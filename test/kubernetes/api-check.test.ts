/** `ebbtide check` and a real API server: with the rights of an administrator, with none, and without a server. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { Finding } from '../../src/cli/check/finding.js';
import { EBBTIDE, run } from '../../src/lab/index.js';
import { type ApiServer, clusterBinaries, startApiServer } from './lib/api-server.js';
import { makeNamespace, makeNode, makePod } from './lib/cluster-objects.js';

const POLICIES = '/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies';
let server: ApiServer;

beforeAll(async () => {
  clusterBinaries();
  server = await startApiServer({ users: [{ token: 'of-nobody', user: 'nobody' }] });
  await makeNode(server, 'n1');
  await makeNamespace(server, 'shop', { 'istio.io/dataplane-mode': 'ambient' });
  await makePod(server, 'shop', 'db', { node: 'n1', ip: '10.1.0.1', labels: { app: 'db' } });
  await makePod(server, 'shop', 'web', { node: 'n1', ip: '10.1.0.2', labels: { app: 'web' } });
});
afterAll(() => server?.close());

async function check(kubeconfig: string, env = {}): Promise<Record<string, Finding>> {
  const { stdout, stderr } = await run(
    [process.execPath, EBBTIDE, 'check', '--output', 'json', '--kubeconfig', kubeconfig],
    { env },
  );
  if (stdout === '') throw new Error(stderr);
  return Object.fromEntries((JSON.parse(stdout) as Finding[]).map((finding) => [finding.code, finding]));
}

it('finds policies that keep out HBONE, roots that are missing, and whose clock it is', async () => {
  const without = await check(server.kubeconfig());
  expect(without['KUBERNETES_API']).toMatchObject({ result: 'ok', seen: expect.stringContaining('Kubernetes v') });
  expect(without['NETWORK_POLICIES']).toMatchObject({ result: 'ok', seen: '0 policies, 2 pods of the mesh' });
  expect(without['CA_ROOT']).toMatchObject({ result: 'failed', seen: expect.stringContaining('missing in shop') });
  expect(without['CLOCK_SKEW']).toMatchObject({ result: 'ok', seen: expect.stringContaining('the Kubernetes API') });

  const ingress = [{ from: [{ podSelector: { matchLabels: { app: 'web' } } }], ports: [{ port: 5432 }] }];
  const body = { metadata: { name: 'db' }, spec: { podSelector: { matchLabels: { app: 'db' } }, ingress } };
  await server.api.request('POST', POLICIES, { body });
  const blocking = await check(server.kubeconfig());
  expect(blocking['NETWORK_POLICIES']).toMatchObject({ result: 'failed' });
  expect(blocking['NETWORK_POLICIES']?.seen).toContain('1 pods without TCP 15008: ingress of shop/db (shop/db)');

  const root = join(server.directory, 'root.pem');
  writeFileSync(root, server.ca);
  const data = { 'root-cert.pem': readFileSync(root, 'utf8') };
  const map = { metadata: { name: 'istio-ca-root-cert' }, data };
  await server.api.request('POST', '/api/v1/namespaces/shop/configmaps', { body: map });
  expect((await check(server.kubeconfig()))['CA_ROOT']).toMatchObject({
    result: 'ok',
    seen: expect.stringContaining('1 roots, the same in 1 namespaces'),
  });
});

it('says what it may not see, and that it does not know then', async () => {
  const findings = await check(server.kubeconfig('of-nobody'));
  expect(findings['KUBERNETES_API']).toMatchObject({
    result: 'ok',
    seen: expect.stringContaining('may not list pods'),
  });
  for (const code of ['NETWORK_POLICIES', 'CA_ROOT']) {
    expect(findings[code]).toMatchObject({ result: 'not tried', seen: expect.stringContaining('no right') });
  }
});

it('goes on without a server', async () => {
  const dead = server.kubeconfig(server.adminToken, 'https://127.0.0.1:1');
  const findings = await check(dead);
  expect(findings['KUBERNETES_API']).toMatchObject({
    result: 'warning',
    seen: expect.stringContaining('ECONNREFUSED'),
  });
  for (const code of ['NETWORK_POLICIES', 'CA_ROOT', 'CLOCK_SKEW']) expect(findings[code]?.result).toBe('not tried');
});
