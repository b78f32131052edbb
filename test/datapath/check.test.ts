/** `ebbtide check` on this machine: it can run, and what is made to fail is found, named and leads to the right exit code. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, it, onTestFinished } from 'vitest';
import { findCgroupRoot } from '../../src/agent/machine.ts';
import { openCapture } from '../../src/agent/native-capture.ts';
import type { Finding } from '../../src/cli/check/finding.ts';
import { EBBTIDE, run } from '../../src/lab/index.ts';
import { OF_CAPTURE } from '../lib/check-codes.ts';
import { bpfObjects } from './capture/lab.ts';

const HERE = fileURLToPath(new URL('check/', import.meta.url));
const NETNS = `ebbtide-check-${process.pid}`;
const NETNS_PATH = `/var/run/netns/${NETNS}`;

let directory: string;
let bpffs: string;
let cgroup: string;
let before: Record<string, number[]>;

const command = (...argv: string[]): string => execFileSync(argv[0] as string, argv.slice(1), { encoding: 'utf8' });

beforeEach(() => {
  before = bpfObjects();
  directory = mkdtempSync(join(tmpdir(), 'ebbtide-check-'));
  bpffs = join(directory, 'bpf');
  cgroup = join(findCgroupRoot(), `ebbtide-check-${process.pid}`);
  mkdirSync(bpffs);
  command('mount', '-t', 'bpf', 'bpf', bpffs);
  mkdirSync(cgroup);
  command('ip', 'netns', 'add', NETNS);
});
afterEach(() => {
  command('ip', 'netns', 'delete', NETNS);
  rmdirSync(cgroup);
  command('umount', bpffs);
  rmSync(directory, { recursive: true });
});

interface Checked {
  readonly code: number;
  readonly stderr: string;
  of(code: string): Finding;
}

/** @param before what enters another place or gives up rights, before the command */
async function check(argv: readonly string[] = [], before: readonly string[] = [], env = {}): Promise<Checked> {
  const flags = ['--output', 'json', '--cgroup', cgroup, '--bpffs', bpffs, '--host-netns', NETNS_PATH];
  const { code, stdout, stderr } = await run([...before, process.execPath, EBBTIDE, 'check', ...flags, ...argv], {
    env,
  });
  const findings = stdout === '' ? [] : (JSON.parse(stdout) as Finding[]);
  return {
    code,
    stderr,
    of(wanted) {
      const found = findings.find((finding) => finding.code === wanted);
      if (found === undefined) throw new Error(`no ${wanted} in ${stdout}${stderr}`);
      return found;
    },
  };
}

/** What the kernel holds that was not there at the start; it frees with a delay. */
async function nothingLeft(): Promise<void> {
  const left = (): string[] =>
    Object.entries(bpfObjects()).flatMap(([kind, ids]) =>
      ids.filter((id) => !before[kind]?.includes(id)).map((id) => `${kind} ${id}`),
    );
  await expect.poll(left, { timeout: 10_000 }).toEqual([]);
}

/** Pins of a foreign program each, loaded from source. */
function loadForeign(): string {
  const object = join(directory, 'foreign.o');
  command(
    ...[
      'clang-19',
      '-g',
      '-O2',
      '-target',
      'bpf',
      '-idirafter',
      `/usr/include/${process.arch === 'x64' ? 'x86_64' : 'aarch64'}-linux-gnu`,
    ],
    ...['-c', join(HERE, 'foreign.bpf.c'), '-o', object],
  );
  command('bpftool', 'prog', 'loadall', object, join(bpffs, 'foreign'));
  onTestFinished(() => rmSync(join(bpffs, 'foreign'), { recursive: true, force: true }));
  return join(bpffs, 'foreign');
}

async function started(argv: readonly string[], said: RegExp): Promise<ChildProcess> {
  const child = spawn(argv[0] as string, argv.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] });
  onTestFinished(async () => {
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
  });
  let text = '';
  await new Promise<void>((resolve, reject) => {
    child.once('exit', () => reject(new Error(`${argv.join(' ')} ended: ${text}`)));
    child.stdout?.on('data', (part: Buffer) => {
      text += part.toString();
      if (said.test(text)) resolve();
    });
  });
  return child;
}

it('0: this machine can run it; nothing is left in the kernel', async () => {
  const checked = await check();
  for (const code of OF_CAPTURE) expect(checked.of(code)).toMatchObject({ result: 'ok' });
  // What cannot be known here is not shown as well.
  for (const code of ['CONTROLLER', 'CLOCK_SKEW', 'KUBERNETES_API', 'NETWORK_POLICIES', 'CA_ROOT']) {
    expect(checked.of(code)).toMatchObject({ result: 'not tried' });
    expect(checked.of(code).seen).not.toBe('');
  }
  expect(checked.code).toBe(0);
  await nothingLeft();
  expect(command('ls', bpffs).trim()).not.toMatch(/check/);
});

it('1: a program on the hook that lets nobody else in; beside one that does it can live', async () => {
  const pin = join(loadForeign(), 'foreign_connect');
  command('bpftool', 'cgroup', 'attach', cgroup, 'connect4', 'pinned', pin);
  const exclusive = await check();
  expect(exclusive.of('CGROUP_PROGRAMS')).toMatchObject({ result: 'failed' });
  expect(exclusive.of('CGROUP_PROGRAMS').seen).toMatch(
    /connect4 foreign_connect \(id \d+, exclusive, owner unknown\) at /,
  );
  expect(exclusive.of('CGROUP_LINKS')).toMatchObject({ result: 'failed' });
  expect(exclusive.of('CGROUP_LINKS').seen).toContain('connect4');
  expect(exclusive.code).toBe(1);
  command('bpftool', 'cgroup', 'detach', cgroup, 'connect4', 'pinned', pin);
  command('bpftool', 'cgroup', 'attach', cgroup, 'connect4', 'pinned', pin, 'multi');
  const beside = await check();
  expect(beside.of('CGROUP_PROGRAMS')).toMatchObject({ result: 'warning', seen: expect.stringContaining('multi') });
  expect(beside.of('CGROUP_LINKS').result).toBe('ok');
  expect(beside.code).toBe(0);
});

it('names sk_lookup programs and tc filters of others, with the process that holds them', async () => {
  const pins = loadForeign();
  await started(['python3', join(HERE, 'attach-lookup.py'), join(pins, 'foreign_lookup'), NETNS_PATH], /attached/);
  command('ip', '-n', NETNS, 'link', 'add', 'pod0', 'type', 'veth', 'peer', 'name', 'pod1');
  command('tc', '-n', NETNS, 'qdisc', 'add', 'dev', 'pod0', 'clsact');
  command(
    ...`tc -n ${NETNS} filter add dev pod0 ingress priority 7 bpf da pinned ${join(pins, 'foreign_tc')}`.split(' '),
  );
  const checked = await check();
  expect(checked.of('SK_LOOKUP_PROGRAMS').result).toBe('warning');
  expect(checked.of('SK_LOOKUP_PROGRAMS').seen).toMatch(
    /^foreign_lookup \(id \d+, of process \d+ python3\) in network/,
  );
  expect(checked.of('INGRESS_PROGRAMS').seen).toMatch(/pod0 tc priority 7 foreign_tc \(id \d+/);
  expect(checked.code).toBe(0);
});

it('1: a port that somebody else has, by its process', async () => {
  const place = ['nsenter', `--net=${NETNS_PATH}`];
  command('ip', '-n', NETNS, 'link', 'set', 'lo', 'up');
  const server = await started([...place, 'python3', '-u', '-m', 'http.server', '15020'], /Serving/);
  const checked = await check([], place);
  expect(checked.of('PORTS')).toMatchObject({ result: 'failed' });
  expect(checked.of('PORTS').seen).toMatch(
    new RegExp(`15020 \\(the proxy's metrics\\) by process ${server.pid} \\(.*http.server`),
  );
  expect(checked.code).toBe(1);
});

it('tells pods whose ephemeral ports are in the way', async () => {
  const place = ['nsenter', `--net=${NETNS_PATH}`];
  command(...place, 'sysctl', '-q', '-w', 'net.ipv4.ip_local_port_range=14000 60000');
  await started([...place, 'sh', '-c', 'echo here; exec sleep 60'], /here/);
  const checked = await check(['--host-netns', '/proc/self/ns/net']);
  expect(checked.of('PORT_RANGE')).toMatchObject({ result: 'warning', seen: expect.stringContaining('14000-60000') });
});

it('2: it says who must run it when it is not root', async () => {
  const { code, stderr } = await check([], ['unshare', '--user']);
  expect(code).toBe(2);
  expect(stderr).toMatch(/must run as root, this is user 65534/);
});

it('1: a cgroup path that is none; what depends on it is not tried', async () => {
  const checked = await check(['--cgroup', directory]);
  expect(checked.of('CGROUP_ROOT')).toMatchObject({ result: 'failed', seen: expect.stringContaining(directory) });
  expect(checked.of('CGROUP_LINKS').result).toBe('not tried');
  expect(checked.of('CAPTURE_PROGRAMS').result).toBe('ok');
  expect(checked.code).toBe(1);
});

it('1: rights that are missing', async () => {
  const checked = await check([], ['setpriv', '--bounding-set', '-sys_admin,-perfmon']);
  expect(checked.of('CAPABILITIES')).toMatchObject({
    result: 'failed',
    seen: expect.stringContaining('CAP_SYS_ADMIN'),
  });
  expect(checked.of('SK_LOOKUP_LINK').result).toBe('not tried');
  expect(checked.of('HOLD')).toMatchObject({ result: 'warning', hint: expect.stringContaining('--hold off') });
  expect(checked.code).toBe(1);
});

it('0: without the kernel’s types new pods cannot be held, and capture works', async () => {
  const hidden = ['unshare', '--mount', 'sh', '-c', 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', 'sh'];
  const checked = await check([], hidden);
  expect(checked.of('BTF').result).toBe('warning');
  expect(checked.of('HOLD').result).toBe('warning');
  expect(checked.of('CAPTURE_PROGRAMS').result).toBe('ok');
  expect(checked.code).toBe(0);
});

it('tells the pins of a running agent from those of another version', async () => {
  const capture = openCapture({ cgroup, pinDirectory: join(bpffs, 'ebbtide-node1') });
  try {
    const checked = await check();
    expect(checked.of('PINS')).toMatchObject({ result: 'ok' });
    expect(checked.of('PINS').seen).toContain(`ebbtide-node1/v2: 0 pods, agent is process ${process.pid}`);
    // An agent's own programs are nobody else's.
    expect(checked.of('CGROUP_PROGRAMS').seen).toBe('none of others');
    expect(checked.of('CGROUP_LINKS').result).toBe('ok');
    expect(checked.code).toBe(0);
  } finally {
    capture.close({ remove: true });
  }
  mkdirSync(join(bpffs, 'ebbtide-node1', 'v1'), { recursive: true });
  const other = await check();
  expect(other.of('PINS')).toMatchObject({ result: 'failed', hint: expect.stringContaining('ebbtide uninstall') });
  expect(other.code).toBe(1);
  await nothingLeft();
});

it('1: a controller that is another than the one that is trusted', async () => {
  const root = join(directory, 'root.pem');
  const [manifests, data] = [join(directory, 'manifests'), join(directory, 'data')];
  mkdirSync(manifests);
  writeFileSync(join(manifests, 'node.yaml'), 'apiVersion: v1\nkind: Node\nmetadata: {name: node1}\n');
  command('ip', '-n', NETNS, 'link', 'set', 'lo', 'up');
  const place = ['nsenter', `--net=${NETNS_PATH}`];
  await started(
    [...place, process.execPath, EBBTIDE, 'controller', '--manifests', manifests, '--data', data],
    /listening/,
  );
  const env = { XDS_ADDRESS: 'https://127.0.0.1:15012', XDS_ROOT_CA: join(data, 'root-cert.pem') };
  const right = await check([], place, env);
  expect(right.of('CONTROLLER')).toMatchObject({ result: 'ok' });
  expect(right.of('CLOCK_SKEW')).toMatchObject({ result: 'ok', seen: expect.stringContaining('the controller') });
  expect(right.code).toBe(0);
  const subject = ['-subj', '/O=ebbtide/CN=ebbtide root', '-addext', 'basicConstraints=critical,CA:true'];
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-noenc', '-keyout', '/dev/null'];
  execFileSync('openssl', ['req', '-x509', ...key, '-out', root, ...subject], { stdio: 'pipe' });
  const wrong = await check([], place, { ...env, XDS_ROOT_CA: root });
  expect(wrong.of('CONTROLLER')).toMatchObject({ result: 'failed', seen: expect.stringContaining('not of a root') });
  expect(wrong.of('CLOCK_SKEW').result).toBe('not tried');
  expect(wrong.code).toBe(1);
});
