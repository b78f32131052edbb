/** `npm run bench`: the mesh against a plain connection and against HAProxy, interleaved in one run. */
import { readFileSync, writeFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { type Lab, lab, type Pod } from '../lib/lab.ts';
import { controlPlane, renderControlPlane } from './control-plane.ts';
import { startHaproxy } from './haproxy.ts';
import { connectionRate, type Figures, type Path, PORTS, residentMb, roundTrip, throughput } from './measure.ts';
import { render, Samples } from './report.ts';

const PATHS = ['direct', 'haproxy', 'mesh', 'mesh-same-node'];
const MANY = 10_000;

const { values: flags } = parseArgs({
  options: {
    json: { type: 'string' },
    seconds: { type: 'string', default: '4' },
    rounds: { type: 'string', default: '3' },
    paths: { type: 'string', default: PATHS.join(',') },
    figures: { type: 'string', default: '1,4,16,rtt,rate,memory' },
    nodes: { type: 'string', default: '1000' },
    pods: { type: 'string', default: '50000' },
    help: { type: 'boolean', default: false },
  },
});
if (flags.help) {
  process.stdout.write(
    'npm run bench -- [--json FILE] [--seconds N] [--rounds N] [--paths direct,haproxy,mesh,mesh-same-node]\n' +
      '                 [--figures 1,4,16,rtt,rate,memory]\n' +
      'npm run bench -- --figures control_plane [--nodes 1000] [--pods 50000] [--seconds 15] [--json FILE]\n',
  );
  process.exit(0);
}
const seconds = Number(flags.seconds);
const rounds = Number(flags.rounds);
const wanted = flags.figures.split(',');
const selected = flags.paths.split(',').filter((path) => PATHS.includes(path));
if (!(seconds > 0) || !(rounds > 0) || selected.length === 0)
  throw new Error('--seconds, --rounds or --paths make no sense');

function progress(text: string): void {
  process.stderr.write(`${text}\n`);
}

let open: Lab | undefined;
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void (open?.close() ?? Promise.resolve()).finally(() => process.exit(130)));
}

async function serve(pod: Pod, traffic: string): Promise<void> {
  await pod.start('iperf3', ['iperf3', '-s', '-p', `${PORTS.iperf}`]);
  await pod.start('echo', [traffic, 'echo', `${PORTS.echo}`]);
  await pod.start('close-first', [traffic, 'close-first', `${PORTS.rate}`, '4']);
  for (const port of Object.values(PORTS)) await pod.listening(port);
}

async function makePaths(within: Lab, traffic: string): Promise<Path[]> {
  within.namespace('plain', { mesh: false });
  within.namespace('meshed', { mesh: true });
  const pods = {
    client: await within.pod({ name: 'client', namespace: 'plain', node: 1 }),
    server: await within.pod({ name: 'server', namespace: 'plain', node: 2 }),
    meshClient: await within.pod({ name: 'client', namespace: 'meshed', node: 1 }),
    meshServer: await within.pod({ name: 'server', namespace: 'meshed', node: 2 }),
    meshNear: await within.pod({ name: 'near', namespace: 'meshed', node: 1 }),
  };
  for (const pod of [pods.server, pods.meshServer, pods.meshNear]) await serve(pod, traffic);
  const haproxy = selected.includes('haproxy')
    ? await startHaproxy(within, pods.server.addresses.v4, Object.values(PORTS))
    : { address: '', processes: [] };
  const usesMesh = selected.some((path) => path.startsWith('mesh'));
  if (usesMesh) await within.startMesh();
  const [node1, node2] = usesMesh ? [within.node(1), within.node(2)] : [];
  const proxies = () => [node1?.proxy, node2?.proxy].filter((process) => process !== undefined);
  const plain = { client: pods.client, server: pods.server };
  const all: Path[] = [
    { ...plain, name: 'direct', address: pods.server.addresses.v4, proxies: () => [] },
    { ...plain, name: 'haproxy', address: haproxy.address, proxies: () => haproxy.processes },
    {
      name: 'mesh',
      client: pods.meshClient,
      server: pods.meshServer,
      address: pods.meshServer.addresses.v4,
      proxies,
    },
    {
      name: 'mesh-same-node',
      client: pods.meshClient,
      server: pods.meshNear,
      address: pods.meshNear.addresses.v4,
      proxies: () => proxies().slice(0, 1),
    },
  ];
  const paths = all.filter((path) => selected.includes(path.name));
  for (const path of paths) await carries(path, traffic);
  return paths;
}

/** Resolves when the path carries a byte, and for the mesh when it carries it as HBONE. */
async function carries(path: Path, traffic: string): Promise<void> {
  const reporter = path.proxies().at(-1);
  await lab.waitFor(
    `the path ${path.name} to carry a byte`,
    async () => {
      const probe = await path.client.run([traffic, 'ping', path.address, `${PORTS.echo}`, '0.01'], {
        timeoutMs: 5000,
      });
      if (probe.code !== 0) throw new Error(probe.stderr.trim());
      if (!path.name.startsWith('mesh') || reporter === undefined) return true;
      const log = readFileSync(reporter.log, 'utf8');
      return log.includes(`${path.server.addresses.v4}:${PORTS.echo}`) && log.includes(path.client.identity);
    },
    { timeoutMs: 30_000, intervalMs: 200, hint: () => reporter?.tail() ?? '' },
  );
}

/** Memory of the proxies: at rest, with many connections open, one minute after they ended. */
async function memory(path: Path, traffic: string, idle: number): Promise<Figures> {
  const holder = await path.client.start(
    'hold',
    [traffic, 'hold', path.address, `${PORTS.echo}`, `${MANY}`],
    'hold.json',
  );
  const file = join(path.client.directory, 'hold.json');
  const opened = await lab.waitFor('the connections to open', () => readFileSync(file, 'utf8').trim() || undefined, {
    timeoutMs: 120_000,
    hint: () => holder.tail(),
  });
  const count = (JSON.parse(opened) as { opened: number }).opened;
  if (count !== MANY)
    throw new Error(`only ${count} of ${MANY} connections opened over ${path.name}: ${holder.tail()}`);
  await lab.sleep(2000);
  const full = residentMb(path.proxies());
  await holder.stop();
  progress('  waiting a minute');
  await lab.sleep(60_000);
  return { rss_idle_mb: idle, rss_10k_mb: full, rss_after_mb: residentMb(path.proxies()) };
}

async function measure(within: Lab): Promise<Samples> {
  const samples = new Samples();
  const traffic = join(within.ground.directory, 'traffic');
  const source = fileURLToPath(new URL('traffic.c', import.meta.url));
  await lab.must(['cc', '-O2', '-Wall', '-Wextra', '-Werror', '-o', traffic, source, '-lpthread']);
  const paths = await makePaths(within, traffic);
  await lab.sleep(3000);
  const mesh = paths.find((path) => path.name === 'mesh');
  const idle = mesh === undefined ? 0 : residentMb(mesh.proxies());
  const parts: Record<string, (path: Path) => Promise<Figures>> = {
    rtt: (path) => roundTrip(path, traffic, seconds),
    rate: (path) => connectionRate(path, traffic, seconds),
  };
  for (const streams of [1, 4, 16]) parts[`${streams}`] = (path) => throughput(path, streams, seconds);
  // Memory comes first, from a proxy that has only carried the probes, so that idle means idle.
  if (mesh !== undefined && wanted.includes('memory')) {
    progress(`mesh: memory with ${MANY} connections`);
    samples.add('mesh', await memory(mesh, traffic, idle));
  }
  for (let round = 1; round <= rounds; round++) {
    for (const figure of wanted.filter((name) => name in parts)) {
      for (const path of paths) {
        const figures = (await parts[figure]?.(path)) ?? {};
        samples.add(path.name, figures);
        const text = Object.entries(figures).map(([name, value]) => `${name} ${value.toPrecision(4)}`);
        progress(`round ${round}/${rounds}  ${path.name.padEnd(15)} ${text.join('  ')}`);
      }
    }
  }
  return samples;
}

function writeJson(figures: object): void {
  if (flags.json === undefined) return;
  const machine = {
    cpu: cpus()[0]?.model ?? '',
    cores: cpus().length,
    memory_gb: Math.round(totalmem() / 1e9),
    kernel: release(),
    node: process.version,
    seconds,
    rounds,
    date: new Date().toISOString(),
  };
  writeFileSync(flags.json, `${JSON.stringify({ machine, figures }, null, 2)}\n`);
}

/** The controller of a large cluster; needs no lab. */
async function measureControlPlane(): Promise<object> {
  const [nodes, pods] = [Number(flags.nodes), Number(flags.pods)];
  if (!(nodes >= 1 && nodes <= 10_000 && pods >= 1 && pods <= 200_000))
    throw new Error('--nodes or --pods make no sense');
  const figures = await controlPlane({ nodes, pods, changesPerSecond: 20, seconds: Math.max(seconds, 5), progress });
  process.stdout.write(`${renderControlPlane(figures, nodes, pods)}\n`);
  return figures;
}

async function measurePaths(): Promise<object> {
  const within = await lab.Lab.create();
  open = within;
  try {
    const report = (await measure(within)).report();
    process.stdout.write(`${render(report, selected)}\n`);
    return report;
  } finally {
    await within.close();
  }
}

const control = wanted.includes('control_plane') ? await measureControlPlane() : undefined;
const paths = wanted.some((figure) => figure !== 'control_plane') ? await measurePaths() : {};
writeJson(control === undefined ? paths : { ...paths, control_plane: control });
