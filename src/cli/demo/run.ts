/** Runs the demo from an empty machine to an empty machine. */
import { existsSync } from 'node:fs';
import {
  cgroup2Root,
  EBBTIDE,
  type Inventory,
  Lab,
  leftSince,
  missingPrograms,
  sleep,
  takeInventory,
} from '../../lab/index.js';
import { METRICS_PORT } from '../../mesh/ports.js';
import { Screen, Stopped } from './screen.js';
import * as steps from './steps.js';
import { makeWorld, PROGRAMS, type World } from './world.js';

/** Exit code of what ^C ended before its end, as shells have it. */
const INTERRUPTED = 130;
/** A step that was left fails by itself once its lab is gone, unless it only waits. */
const SETTLE_MS = 3000;

/** @returns the exit code: 0 when every step succeeded and nothing was left */
export async function runDemo(options: { readonly keep: boolean }): Promise<number> {
  const stopped = new AbortController();
  const screen = new Screen(stopped.signal);
  const problem = await cannotRun();
  if (problem !== '') {
    screen.say(problem);
    return 1;
  }
  screen.say('Ebbtide demo: two nodes and nine pods on this machine, each a network namespace of its own');
  const onSignal = () => stopped.abort();
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  const before = await takeInventory();
  const lab = await Lab.create();
  const started = performance.now();
  let during: Inventory | undefined;
  let interrupted = false;
  let problems: string[] = [];
  try {
    const world = await show(screen, lab);
    during = await takeInventory();
    if (options.keep && world !== undefined && !stopped.signal.aborted) {
      screen.say(lookAround(world));
      await new Promise<void>((resolve) => stopped.signal.addEventListener('abort', () => resolve(), { once: true }));
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    interrupted = true;
  } finally {
    screen.say('   stopping');
    problems = await lab.stopMesh().catch((error: Error) => [error.message]);
    await lab.close();
    // What was interrupted may have made something while the rest was taken away.
    await Promise.race([screen.settled(), sleep(SETTLE_MS)]);
    await lab.close();
  }
  if (interrupted) {
    screen.say('   interrupted; everything is removed');
    return INTERRUPTED;
  }
  await screen.lastStep('everything is stopped, nothing is left behind', () =>
    nothingLeft(lab, before, during, problems),
  );
  const seconds = Math.round((performance.now() - started) / 1000);
  const verdict =
    screen.failed === 0
      ? `all ${screen.passed} steps succeeded`
      : `${screen.failed} of ${screen.failed + screen.passed} steps FAILED`;
  screen.say(`${verdict}, ${seconds} s`);
  return screen.failed === 0 ? 0 : 1;
}

/** Why this machine cannot run the demo, or ''. */
async function cannotRun(): Promise<string> {
  if (process.platform !== 'linux') return `the demo needs Linux; this is ${process.platform}`;
  if (process.getuid?.() !== 0)
    return 'the demo needs root, to load BPF programs and make network namespaces: run it in a root shell';
  if (!existsSync(EBBTIDE)) return `${EBBTIDE} is missing: npm run build`;
  try {
    cgroup2Root();
  } catch (error) {
    return (error as Error).message;
  }
  const missing = await missingPrograms(PROGRAMS);
  return missing.length === 0
    ? ''
    : `missing: ${missing.join(', ')}. Install them with apt-get install, or run bash .ci/setup`;
}

/** The steps up to the end; without a mesh there is nothing to show after a failed start. */
async function show(screen: Screen, lab: Lab): Promise<World | undefined> {
  let world: World | undefined;
  const up = await screen.step('two nodes; nginx, redis, sshd and their clients run, without a mesh', async () => {
    world = await makeWorld(lab);
    return `${lab.pods.length} pods, IPv4 and IPv6, in 4 namespaces`;
  });
  if (!up || world === undefined) return world;
  const made = world;
  // From before the mesh is there, so that the beginning of every tunnel is in it.
  const recording = await lab.recordWire('wire');
  const meshed = await screen.step('a controller, and an agent and a proxy on each node, are ready', async () => {
    await lab.startMesh();
    return 'five processes';
  });
  if (!meshed) return made;
  if (!(await screen.step('the pods of labelled namespaces are captured as they run', () => steps.enrolled(made))))
    return made;
  const capturedMs = Date.now();
  await screen.step('traffic flows between nodes by pod address, IPv4 and IPv6', () => steps.byPodAddress(made));
  await screen.step('traffic flows between nodes by Service address', () => steps.byService(made));
  await screen.step('a server that speaks first is heard', () => steps.serverSpeaksFirst(made));
  await screen.step('the wire between the nodes holds only TLS 1.3', async () =>
    steps.onlyTls(made, await recording.stop(), capturedMs),
  );
  await screen.step("the server sees the client pod's own address", () => steps.clientAddress(made));
  await screen.step('an AuthorizationPolicy denies a client and cuts what it had open', () => steps.denied(made));
  await screen.step('a STRICT namespace refuses a plaintext client', () => steps.strict(made));
  await screen.step('labelling a namespace captures its running pods', () => steps.labelled(made));
  await screen.step('un-labelling lets them go', () => steps.unlabelled(made));
  await screen.step('metrics name both identities', () => steps.metrics(made));
  return made;
}

async function nothingLeft(
  lab: Lab,
  before: Inventory,
  during: Inventory | undefined,
  problems: readonly string[],
): Promise<string> {
  if (problems.length > 0) throw new Error(problems.join('\n'));
  const ours = (kind: string, name: string) => name.includes(lab.ground.id) || (during?.[kind]?.has(name) ?? false);
  const left = await leftSince(before, ours);
  if (left.length > 0) throw new Error(`left behind: ${left.join(', ')}`);
  return 'no BPF program, map, link or pin, no namespace, interface, cgroup, process or file';
}

function lookAround(world: World): string {
  const { lab, browser, web, worker } = world;
  const enter = (netns: string, command: string) => `  nsenter --net=${netns} ${command}`;
  const node = lab.ground.netnsPath('node2');
  const group = `echo 0 >${browser.place.cgroup}/cgroup.procs`;
  return [
    '',
    'It stays up until ^C. In another root shell:',
    'a command in a pod (its cgroup, its network namespace):',
    `  sh -c '${group}; exec nsenter --net=${browser.place.netns} curl -s http://${web.addresses.v4}/'`,
    enter(worker.place.netns, `redis-cli -h ${world.cacheService.v4} PING`),
    `manifests, read again when you change one: ${lab.manifests.directory}`,
    `logs, one file a process: ${lab.ground.directory}/logs`,
    `metrics, http://127.0.0.1:${METRICS_PORT}/metrics on each node:`,
    enter(node, `curl -s http://127.0.0.1:${METRICS_PORT}/metrics`),
    'the wire between the nodes:',
    enter(node, 'tcpdump -ni wire0'),
    '',
  ].join('\n');
}
