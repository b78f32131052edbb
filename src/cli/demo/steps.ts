/** What the demo shows, one function a step. Each returns the evidence in a few words or throws with what was seen instead. */
import {
  analyseCapture,
  authorizationPolicy,
  type Finished,
  namespaceManifest,
  nginxClients,
  type Pod,
  patient,
  peerAuthentication,
  sumMetrics,
  waitFor,
} from '../../lab/index.js';
import { HBONE_PORT } from '../../mesh/ports.js';
import type { World } from './world.js';

const OPENED = 'istio_tcp_connections_opened_total';

function curl(from: Pod, url: string): Promise<Finished> {
  return from.run(['curl', '-sS', '--max-time', `${patient(10_000) / 1000}`, url]);
}

async function page(from: Pod, url: string): Promise<string> {
  const answer = await curl(from, url);
  if (answer.code !== 0)
    throw new Error(`curl ${url} from ${from.id} failed (${answer.code}): ${answer.stderr.trim()}`);
  return answer.stdout.trim();
}

async function expectPage(from: Pod, url: string, text: string): Promise<void> {
  const body = await page(from, url);
  if (body !== text)
    throw new Error(`curl ${url} from ${from.id} brought ${JSON.stringify(body)} instead of "${text}"`);
}

function redis(from: Pod, address: string, ...command: readonly string[]): Promise<Finished> {
  return from.run(['redis-cli', '-h', address, ...command], { timeoutMs: 15_000 });
}

/** redis-cli says errors on standard output with exit code 0 or 1, by version: what counts is the answer. */
async function expectRedis(from: Pod, address: string, command: readonly string[], answer: string): Promise<void> {
  const said = await redis(from, address, ...command);
  if (said.stdout.trim() !== answer) {
    throw new Error(
      `redis-cli ${command[0]} from ${from.id} said ${JSON.stringify(`${said.stdout}${said.stderr}`.trim())}`,
    );
  }
}

/** Connections from one identity to another that the server's node has counted as mutual TLS. */
async function mutualTlsCount(world: World, client: Pod, server: Pod): Promise<number> {
  return sumMetrics(await world.lab.node(server.node).metrics(), OPENED, {
    reporter: 'destination',
    connection_security_policy: 'mutual_tls',
    source_principal: client.identity,
    destination_principal: server.identity,
  });
}

/** Asks again and again until the server's node counts a connection of the client as mutual TLS. */
async function captured(world: World, client: Pod, server: Pod, port: number): Promise<void> {
  const before = await mutualTlsCount(world, client, server);
  await waitFor(
    `a connection from ${client.id} to ${server.id} to be carried with mutual TLS`,
    async () => {
      await client.run(['bash', '-c', `exec 3<>/dev/tcp/${server.addresses.v4}/${port}`], { timeoutMs: 5000 });
      return (await mutualTlsCount(world, client, server)) > before;
    },
    { timeoutMs: 30_000, intervalMs: 100, hint: () => logs(world) },
  );
}

function logs(world: World): string {
  const processes = [world.lab.controller, ...world.lab.nodes.flatMap((node) => [node.agent, node.proxy])];
  return processes
    .filter((process) => process !== undefined)
    .map((process) => `--- ${process.name} (${process.fate})\n${process.tail(6)}`)
    .join('\n');
}

export async function enrolled(world: World): Promise<string> {
  const started = performance.now();
  await captured(world, world.browser, world.web, 80);
  await captured(world, world.worker, world.cache, 6379);
  await captured(world, world.browser, world.ssh, 22);
  await captured(world, world.browser, world.store, 80);
  return `none was restarted; captured ${Math.round(performance.now() - started)} ms after the proxies were ready`;
}

export async function byPodAddress(world: World): Promise<string> {
  const { v4, v6 } = world.web.addresses;
  await expectPage(world.browser, `http://${v4}/${world.markers.path}`, world.markers.page);
  await expectPage(world.browser, `http://[${v6}]/${world.markers.path}`, world.markers.page);
  return `curl on node1 read nginx on node2 at ${v4} and [${v6}]`;
}

export async function byService(world: World): Promise<string> {
  const { v4, v6 } = world.webService;
  await expectPage(world.browser, `http://${v4}/${world.markers.path}`, world.markers.page);
  await expectPage(world.browser, `http://[${v6}]/${world.markers.path}`, world.markers.page);
  await expectRedis(world.worker, world.cacheService.v4, ['SET', 'demo', world.markers.value], 'OK');
  await expectRedis(world.worker, world.cacheService.v6, ['GET', 'demo'], world.markers.value);
  return `curl at ${v4} and [${v6}], redis-cli SET and GET at ${world.cacheService.v4} and [${world.cacheService.v6}]`;
}

export async function serverSpeaksFirst(world: World): Promise<string> {
  const address = world.ssh.addresses.v4;
  const scan = await world.browser.run(['ssh-keyscan', '-T', '10', '-t', 'ed25519', address]);
  if (!scan.stdout.includes('ssh-ed25519')) throw new Error(`ssh-keyscan brought no key: ${scan.stderr.trim()}`);
  const banner = /SSH-2\.0-\S+/.exec(scan.stderr)?.[0] ?? 'its host key';
  return `sshd greeted with ${banner}, ssh-keyscan has its host key`;
}

/**
 * What was on the wire during the steps before.
 * @param file a recording from before the mesh was started, so that it has the beginning of every tunnel
 * @param sinceMs when all pods were captured: connections that began earlier may have been plain
 */
export function onlyTls(world: World, file: string, sinceMs: number): string {
  const { markers } = world;
  const report = analyseCapture(file, [markers.page, markers.path, markers.value]);
  const [leak] = report.markersFound;
  if (leak !== undefined) throw new Error(`"${leak.marker}" is readable on the wire (${leak.where})`);
  if (report.others.length > 0) throw new Error(`on the wire beside TCP: ${report.others.join(', ')}`);
  const meant = report.connections.filter(
    ({ serverPort, startedMs }) => serverPort === HBONE_PORT || startedMs >= sinceMs,
  );
  for (const { client, server, serverPort, protocol } of meant) {
    if (serverPort !== HBONE_PORT || (protocol !== 'tls1.3' && protocol !== 'empty')) {
      throw new Error(`${client} -> ${server} on the wire is ${protocol}`);
    }
  }
  const tls = meant.filter(({ protocol }) => protocol === 'tls1.3');
  if (tls.length === 0) throw new Error(`no TLS 1.3 connection among ${report.packets} packets on the wire`);
  const bytes = tls.reduce((sum, { payloadBytes }) => sum + payloadBytes, 0);
  return `${report.packets} packets, ${tls.length} connections to port ${HBONE_PORT}, all TLS 1.3; ${bytes} bytes without the payload`;
}

export async function clientAddress(world: World): Promise<string> {
  const { v4, v6 } = world.browser.addresses;
  const known = nginxClients(world.web);
  await expectPage(world.browser, `http://${world.web.addresses.v4}/`, world.markers.page);
  await expectPage(world.browser, `http://[${world.web.addresses.v6}]/`, world.markers.page);
  const seen = await waitFor('nginx to log both requests', () => {
    const fresh = nginxClients(world.web).slice(known.length);
    return fresh.length >= 2 && fresh;
  });
  if (seen[0] !== v4 || seen[1] !== v6)
    throw new Error(`nginx logged ${seen.join(' and ')}; the client is ${v4} and ${v6}`);
  return `nginx logged ${seen[0]} and ${seen[1]}`;
}

export async function denied(world: World): Promise<string> {
  const { worker, browser, cache, lab } = world;
  const address = cache.addresses.v4;
  await expectRedis(worker, address, ['PING'], 'PONG');
  const script = `exec 3<>/dev/tcp/${address}/6379; printf 'SUBSCRIBE news\\r\\n' >&3; exec cat <&3`;
  const open = await worker.start('subscriber', ['bash', '-c', script], 'subscriber.out');
  await waitFor('redis to see the subscriber', async () => {
    const clients = await cache.run(['redis-cli', 'PUBSUB', 'NUMSUB', 'news']);
    return /^1$/m.test(clients.stdout);
  });
  const policy = authorizationPolicy('no-worker', cache.namespace, {
    selector: { matchLabels: { app: cache.name } },
    action: 'DENY',
    rules: [{ from: [{ source: { principals: [worker.identity.slice('spiffe://'.length)] } }] }],
  });
  const written = performance.now();
  let cutMs: number | undefined;
  void open.ended().then(() => {
    cutMs = Math.round(performance.now() - written);
  });
  lab.manifests.write(policy);
  try {
    const deniedMs = await waitFor(
      'the new connection of the denied client to be refused',
      async () =>
        (await redis(worker, address, 'PING')).stdout.trim() !== 'PONG' && Math.round(performance.now() - written),
      { timeoutMs: 10_000, intervalMs: 10, hint: () => logs(world) },
    );
    const cut = await waitFor('the open connection of the denied client to be cut', () => cutMs, { timeoutMs: 10_000 });
    await expectRedis(browser, address, ['PING'], 'PONG');
    if (deniedMs > 1000 || cut > 1000)
      throw new Error(`denied after ${deniedMs} ms, cut after ${cut} ms: more than a second`);
    return `new connections refused after ${deniedMs} ms, the open one cut after ${cut} ms; another client still reads`;
  } finally {
    lab.manifests.remove(policy);
    await open.stop();
  }
}

export async function strict(world: World): Promise<string> {
  const { visitor, store, browser, lab } = world;
  const url = `http://${store.addresses.v4}/`;
  await expectPage(visitor, url, 'store');
  const started = performance.now();
  lab.manifests.write(peerAuthentication('default', store.namespace, 'STRICT'));
  const refusal = await waitFor(
    'the plaintext client to be refused',
    async () => {
      const answer = await curl(visitor, url);
      return answer.code !== 0 && answer.stderr.trim();
    },
    { timeoutMs: 10_000, intervalMs: 10, hint: () => logs(world) },
  );
  const ms = Math.round(performance.now() - started);
  await expectPage(browser, url, 'store');
  return `refused after ${ms} ms ("${refusal.replace(/^curl: /, '')}"); a client with mutual TLS still reads`;
}

/** Talks over a recorded wire. @returns the ports to which payload went: of a pooled tunnel also while it ends */
async function portsOnWire(world: World, name: string): Promise<number[]> {
  const recording = await world.lab.recordWire(name);
  await expectPage(world.lateClient, `http://${world.lateWeb.addresses.v4}/`, 'late');
  const report = analyseCapture(await recording.stop(), []);
  return [
    ...new Set(report.connections.filter(({ payloadBytes }) => payloadBytes > 0).map(({ serverPort }) => serverPort)),
  ];
}

function expectPorts(when: string, ports: readonly number[], expected: { readonly plain: boolean }): void {
  const right = expected.plain ? ports.includes(80) : ports.length === 1 && ports[0] === HBONE_PORT;
  if (!right) throw new Error(`${when} the wire has port ${ports.join(', ') || 'none'}`);
}

export async function labelled(world: World): Promise<string> {
  expectPorts('before the label', await portsOnWire(world, 'late-before'), { plain: true });
  world.lab.manifests.write(namespaceManifest('late', true));
  const started = performance.now();
  await captured(world, world.lateClient, world.lateWeb, 80);
  const ms = Math.round(performance.now() - started);
  // The pool may already hold the tunnel: a recording that starts now sees its records, and no connection to port 80.
  expectPorts('after the label', await portsOnWire(world, 'late-labelled'), { plain: false });
  process.kill(world.lateNginx, 0);
  return `port 80 on the wire before, ${HBONE_PORT} after ${ms} ms; nginx is still process ${world.lateNginx}`;
}

export async function unlabelled(world: World): Promise<string> {
  world.lab.manifests.write(namespaceManifest('late', false));
  const started = performance.now();
  await waitFor(
    'a connection within the namespace to be plain again',
    async () => {
      const before = await mutualTlsCount(world, world.lateClient, world.lateWeb);
      const answer = await curl(world.lateClient, `http://${world.lateWeb.addresses.v4}/`);
      return (
        answer.stdout.trim() === 'late' && (await mutualTlsCount(world, world.lateClient, world.lateWeb)) === before
      );
    },
    { timeoutMs: 20_000, intervalMs: 100, hint: () => logs(world) },
  );
  const ms = Math.round(performance.now() - started);
  expectPorts('after un-labelling', await portsOnWire(world, 'late-unlabelled'), { plain: true });
  process.kill(world.lateNginx, 0);
  return `port 80 again after ${ms} ms; nginx is still process ${world.lateNginx}`;
}

export async function metrics(world: World): Promise<string> {
  const { browser, web } = world;
  const atServer = await mutualTlsCount(world, browser, web);
  const atClient = sumMetrics(await world.lab.node(browser.node).metrics(), OPENED, {
    reporter: 'source',
    connection_security_policy: 'mutual_tls',
    source_principal: browser.identity,
    destination_principal: web.identity,
  });
  if (atServer === 0 || atClient === 0) {
    throw new Error(
      `${OPENED} of ${browser.identity} -> ${web.identity}: ${atClient} at the source, ${atServer} at the destination`,
    );
  }
  return `${OPENED} ${atClient} at the source, ${atServer} at the destination: ${browser.identity} -> ${web.identity}`;
}
