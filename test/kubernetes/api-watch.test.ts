/** Lists that are kept up to date, against a real API server and against what happens to servers and networks. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { waitFor } from '../../src/lab/wait.js';
import { type Api, openApi, Watched, type WatchedOptions } from '../../src/mesh/api/index.js';
import { type ApiServer, startApiServer } from './lib/api-server.js';
import { Relay } from './lib/relay.js';

const log = pino({ level: process.env['EBBTIDE_LOG'] ?? 'silent' });
const WAIT_MS = 60_000;

interface ConfigMap {
  readonly metadata: { readonly name: string; readonly namespace?: string; readonly resourceVersion?: string };
  readonly data?: Readonly<Record<string, string>>;
}

const wait = (what: string, condition: () => boolean | Promise<boolean>): Promise<unknown> =>
  waitFor(what, condition, { timeoutMs: WAIT_MS });

let server: ApiServer;
let relay: Relay;
const open: Watched<ConfigMap>[] = [];
let serial = 0;

beforeAll(async () => {
  server = await startApiServer();
  relay = await Relay.start(server.port);
});

afterEach(async () => {
  relay.mode = 'pass';
  await Promise.all(open.splice(0).map((watched) => watched.close()));
});

afterAll(async () => {
  await relay?.close();
  await server?.close();
});

/** A watch of the ConfigMaps of a namespace of its own, through the relay. */
async function watchConfigMaps(options: Partial<WatchedOptions<ConfigMap>> = {}, api?: Api) {
  const namespace = `watch-${++serial}`;
  await server.api.request('POST', '/api/v1/namespaces', { body: { metadata: { name: namespace } } });
  const path = `/api/v1/namespaces/${namespace}/configmaps`;
  const changes: string[][] = [];
  const watched = new Watched<ConfigMap>({
    api: api ?? openApi({ kubeconfig: server.kubeconfig(undefined, relay.url) }),
    path,
    log,
    changed: (keys) => void changes.push([...keys]),
    ...options,
  });
  open.push(watched);
  const put = (name: string, value: string): Promise<unknown> =>
    server.api.request('PATCH', `${path}/${name}`, {
      query: { fieldManager: 'test', force: true },
      contentType: 'application/apply-patch+yaml',
      body: { apiVersion: 'v1', kind: 'ConfigMap', metadata: { name }, data: { value } },
    });
  const remove = (name: string): Promise<unknown> => server.api.request('DELETE', `${path}/${name}`);
  const value = (name: string): string | undefined => watched.items().get(`${namespace}/${name}`)?.data?.['value'];
  const sees = (name: string, wanted: string | undefined): Promise<unknown> =>
    wait(`${name} is ${wanted}`, () => value(name) === wanted);
  return { namespace, path, watched, changes, put, remove, value, sees };
}

describe('a watched list', () => {
  it('reads more objects than a page holds, tells of changes, and keeps objects that did not change', async () => {
    const { watched, changes, put, remove, sees, namespace } = await watchConfigMaps();
    for (let start = 0; start < 1100; start += 50) {
      await Promise.all(Array.from({ length: 50 }, (_, index) => put(`map-${start + index}`, 'first')));
    }
    await watched.start();
    expect(watched.items().size).toBe(1100);
    expect(watched.counters.pages).toBe(11);
    expect(changes).toEqual([]);
    const kept = watched.items().get(`${namespace}/map-1`);
    await put('map-0', 'second');
    await sees('map-0', 'second');
    await remove('map-2');
    await sees('map-2', undefined);
    expect(changes.flat()).toEqual([`${namespace}/map-0`, `${namespace}/map-2`]);
    expect(watched.items().get(`${namespace}/map-1`)).toBe(kept);
    expect(watched.counters.lists).toBe(1);
  });

  it('keeps an object that reduces to what it was, and tells nobody', async () => {
    const { watched, changes, put, sees, namespace, path } = await watchConfigMaps({
      pick: ({ metadata, ...rest }) => ({
        metadata: { name: metadata.name, namespace: metadata.namespace ?? '' },
        data: (rest as ConfigMap).data ?? {},
      }),
    });
    await put('one', 'a');
    await watched.start();
    const before = watched.items().get(`${namespace}/one`);
    await server.api.request('PATCH', `${path}/one`, { body: { metadata: { labels: { irrelevant: 'yes' } } } });
    await put('two', 'b');
    await sees('two', 'b');
    expect(watched.items().get(`${namespace}/one`)).toBe(before);
    expect(changes.flat()).toEqual([`${namespace}/two`]);
  });

  it('starts while the server is away, once that is there', async () => {
    const { watched, put, sees } = await watchConfigMaps({ times: { maxBackoff: 500 } });
    await put('one', 'a');
    relay.mode = 'stall';
    relay.cut();
    await server.stopServer();
    const started = watched.start();
    await sleep(1000);
    expect(watched.items().size).toBe(0);
    relay.mode = 'pass';
    await server.startServer();
    await started;
    await sees('one', 'a');
  });

  it('survives a restart of the API server without reading the list again, and keeps its state meanwhile', async () => {
    const { watched, put, value, sees } = await watchConfigMaps({ times: { maxBackoff: 500 } });
    await put('one', 'a');
    await watched.start();
    await server.stopServer('SIGKILL');
    await wait('the watch has ended', () => !watched.watching);
    await sleep(300);
    expect(value('one')).toBe('a');
    await server.startServer();
    await put('one', 'b');
    await sees('one', 'b');
    expect(watched.counters.failures).toBeGreaterThan(0);
    expect(watched.watching).toBe(true);
  });

  it('reads the list again where etcd has compacted what it missed (410), and loses nothing', async () => {
    const { watched, changes, put, remove, sees, namespace } = await watchConfigMaps({ times: { maxBackoff: 500 } });
    await put('stays', 'a');
    await put('changes', 'a');
    await put('goes', 'a');
    await watched.start();
    const stays = watched.items().get(`${namespace}/stays`);
    // Out of sight, and the server's own memory of changes goes with it.
    relay.mode = 'stall';
    await put('changes', 'b');
    await remove('goes');
    await put('comes', 'a');
    await server.stopServer();
    await server.startServer();
    await put('comes', 'b');
    await server.compact();
    relay.mode = 'pass';
    relay.cut();
    await sees('comes', 'b');
    await sees('changes', 'b');
    await sees('goes', undefined);
    expect(watched.items().get(`${namespace}/stays`)).toBe(stays);
    expect(watched.counters.expired).toBeGreaterThan(0);
    expect(watched.counters.lists).toBe(2);
    expect(new Set(changes.flat())).toEqual(
      new Set(['changes', 'goes', 'comes'].map((name) => `${namespace}/${name}`)),
    );
  });

  it('reads the list again when a watch that is served from etcd itself says 410', async () => {
    const { watched, put, sees } = await watchConfigMaps({ times: { maxBackoff: 500 } });
    await put('one', 'a');
    await watched.start();
    relay.mode = 'stall';
    await put('one', 'b');
    await server.stopServer();
    await server.startServer(['--watch-cache=false']);
    await put('one', 'c');
    await server.compact();
    relay.mode = 'pass';
    relay.cut();
    await sees('one', 'c');
    expect(watched.counters.expired).toBeGreaterThan(0);
    await server.stopServer();
    await server.startServer();
  });

  it('gives up a connection from which nothing comes, and catches up over another', async () => {
    const { watched, put, value, sees } = await watchConfigMaps({ times: { silence: 3000, maxBackoff: 500 } });
    await put('one', 'a');
    await watched.start();
    await wait('the watch is open', () => watched.watching);
    relay.mode = 'stall';
    await put('one', 'b');
    await wait('the silence is noticed', () => watched.counters.silences > 0);
    // New connections are silent as well: they must not be waited for without end either.
    await wait('a silent request fails', () => watched.counters.failures > 0);
    expect(value('one')).toBe('a');
    relay.mode = 'pass';
    await sees('one', 'b');
    expect(watched.counters.lists).toBe(1);
  });

  it('goes on where it was when connections are cut, also within a line', async () => {
    const { watched, put, sees } = await watchConfigMaps({ times: { maxBackoff: 300 } });
    await put('one', '0');
    await watched.start();
    for (let round = 1; round <= 10; round++) {
      await wait('the watch is open', () => watched.watching);
      relay.cut(round % 2 === 0 ? 'fin' : 'reset');
      await put('one', String(round));
      await sees('one', String(round));
    }
    expect(watched.counters.lists).toBe(1);
    expect(watched.counters.watches).toBeGreaterThan(10);
  });

  it('takes a new token from its file when the old one is refused', async () => {
    const namespace = `watch-${serial + 1}`;
    const grant = async (): Promise<void> => {
      await server.api.request('POST', `/api/v1/namespaces/${namespace}/serviceaccounts`, {
        body: { metadata: { name: 'reader' } },
      });
      const rbac = `/apis/rbac.authorization.k8s.io/v1/namespaces/${namespace}`;
      await server.api.request('POST', `${rbac}/roles`, {
        body: {
          metadata: { name: 'reader' },
          rules: [{ apiGroups: [''], resources: ['configmaps'], verbs: ['list', 'watch'] }],
        },
      });
      await server.api.request('POST', `${rbac}/rolebindings`, {
        body: {
          metadata: { name: 'reader' },
          roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'Role', name: 'reader' },
          subjects: [{ kind: 'ServiceAccount', name: 'reader', namespace }],
        },
      });
    };
    const directory = server.serviceAccountDirectory('not-a-token', namespace);
    const api = openApi({ server: relay.url, serviceAccountDirectory: directory });
    const { watched, put, sees } = await watchConfigMaps({ times: { maxBackoff: 500 } }, api);
    await grant();
    const pod = await server.api.request<{ metadata: { name: string; uid: string } }>(
      'POST',
      `/api/v1/namespaces/${namespace}/pods`,
      {
        body: {
          metadata: { name: 'p' },
          spec: { serviceAccountName: 'reader', containers: [{ name: 'c', image: 'i' }] },
        },
      },
    );
    const { name, uid } = pod.metadata;
    writeFileSync(join(directory, 'token'), await server.token(namespace, 'reader', { pod: { name, uid } }));
    await put('one', 'a');
    await watched.start();
    expect(api.namespace()).toBe(namespace);
    // A token that is bound to a pod dies with it.
    await server.api.request('DELETE', `/api/v1/namespaces/${namespace}/pods/p`, { query: { gracePeriodSeconds: 0 } });
    relay.cut();
    await put('one', 'b');
    await wait('the dead token is refused', () => {
      relay.cut();
      return watched.counters.unauthorized > 0;
    });
    writeFileSync(join(directory, 'token'), await server.token(namespace, 'reader'));
    await sees('one', 'b');
    await put('one', 'c');
    await sees('one', 'c');
  });

  it('is empty while its resource does not exist, and finds it when it is installed', async () => {
    const { watched } = await watchConfigMaps({
      path: '/apis/test.ebbtide.dev/v1/things',
      optional: true,
      times: { absent: 300, maxBackoff: 300 },
    });
    await watched.start();
    expect(watched.items().size).toBe(0);
    const definition = {
      metadata: { name: 'things.test.ebbtide.dev' },
      spec: {
        group: 'test.ebbtide.dev',
        scope: 'Namespaced',
        names: { kind: 'Thing', listKind: 'ThingList', plural: 'things', singular: 'thing' },
        versions: [
          {
            name: 'v1',
            served: true,
            storage: true,
            schema: { openAPIV3Schema: { type: 'object', 'x-kubernetes-preserve-unknown-fields': true } },
          },
        ],
      },
    };
    const definitions = '/apis/apiextensions.k8s.io/v1/customresourcedefinitions';
    await server.api.request('POST', definitions, { body: definition });
    await wait('the new resource is served', () =>
      server.api
        .request('POST', '/apis/test.ebbtide.dev/v1/namespaces/default/things', {
          body: { apiVersion: 'test.ebbtide.dev/v1', kind: 'Thing', metadata: { name: 'one' } },
        })
        .then(
          () => true,
          () => false,
        ),
    );
    await wait('the object is seen', () => watched.items().has('default/one'));
    await server.api.request('DELETE', `${definitions}/things.test.ebbtide.dev`);
    await wait('the list is empty again', () => watched.items().size === 0);
  });

  it('does not ask in a circle where it may list but not watch', async () => {
    const name = 'list-only';
    await server.api.request('POST', '/apis/rbac.authorization.k8s.io/v1/clusterroles', {
      body: { metadata: { name }, rules: [{ apiGroups: [''], resources: ['configmaps'], verbs: ['list'] }] },
    });
    await server.api.request('POST', '/api/v1/namespaces/default/serviceaccounts', { body: { metadata: { name } } });
    await server.api.request('POST', '/apis/rbac.authorization.k8s.io/v1/clusterrolebindings', {
      body: {
        metadata: { name },
        roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'ClusterRole', name },
        subjects: [{ kind: 'ServiceAccount', name, namespace: 'default' }],
      },
    });
    const directory = server.serviceAccountDirectory(await server.token('default', name), 'default');
    const { watched } = await watchConfigMaps({}, openApi({ server: relay.url, serviceAccountDirectory: directory }));
    await watched.start();
    await sleep(6000);
    expect(watched.counters.watches).toBe(0);
    // 0.2 + 0.4 + 0.8 + ... s, halved at most by the jitter.
    expect(watched.counters.lists).toBeLessThan(8);
  });
});
