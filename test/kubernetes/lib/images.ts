/** Container images made on this machine from its own programs, as docker-archive tars that `ctr images import` takes. */
import { createHash } from 'node:crypto';
import { cpSync, existsSync, mkdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { must } from '../../../src/lab/exec.ts';

export const PAUSE_IMAGE = 'localhost/pause:lab';
export const TOOLS_IMAGE = 'localhost/tools:lab';

const PROGRAMS = fileURLToPath(new URL('../programs', import.meta.url));
const PEERS = fileURLToPath(new URL('../../lib/programs', import.meta.url));

/** Packs a root file system as an image. @returns path of the tar */
async function pack(directory: string, reference: string, root: string, command: readonly string[]): Promise<string> {
  const layer = join(directory, 'layer.tar');
  await must([
    'tar',
    '--sort=name',
    '--mtime=@0',
    '--owner=0',
    '--group=0',
    '--numeric-owner',
    '-C',
    root,
    '-cf',
    layer,
    '.',
  ]);
  const diffId = createHash('sha256').update(readFileSync(layer)).digest('hex');
  const config = JSON.stringify({
    architecture: process.arch === 'arm64' ? 'arm64' : 'amd64',
    os: 'linux',
    config: { Cmd: command, Env: ['PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'] },
    rootfs: { type: 'layers', diff_ids: [`sha256:${diffId}`] },
  });
  writeFileSync(join(directory, 'config.json'), config);
  const manifest = [{ Config: 'config.json', RepoTags: [reference], Layers: ['layer.tar'] }];
  writeFileSync(join(directory, 'manifest.json'), JSON.stringify(manifest));
  const tar = join(directory, 'image.tar');
  await must(['tar', '-C', directory, '-cf', tar, 'manifest.json', 'config.json', 'layer.tar']);
  rmSync(layer);
  rmSync(root, { recursive: true });
  return tar;
}

/** The sandbox image: one static program. */
export async function makePauseImage(directory: string): Promise<string> {
  const root = join(directory, 'root');
  mkdirSync(root, { recursive: true });
  await must(['gcc', '-Os', '-static', '-o', join(root, 'pause'), join(PROGRAMS, 'pause.c')]);
  return pack(directory, PAUSE_IMAGE, root, ['/pause']);
}

/** Programs of this machine that pods of the tests run. */
const TOOLS = [
  '/bin/sh',
  '/bin/bash',
  '/bin/sleep',
  '/bin/cat',
  '/bin/ls',
  '/usr/bin/env',
  '/usr/bin/python3',
  '/usr/bin/curl',
  '/bin/ss',
];

/** An image of shell, curl, ss, python3 and the tests' own client and server programs (in /programs). */
export async function makeToolsImage(directory: string): Promise<string> {
  const root = join(directory, 'root');
  for (const folder of ['bin', 'lib', 'usr', 'etc', 'tmp', 'programs'])
    mkdirSync(join(root, folder), { recursive: true });
  for (const tool of TOOLS) await copyProgram(tool, root);
  const version = (
    await must(['/usr/bin/python3', '-c', 'import sys; print("python%d.%d" % sys.version_info[:2])'])
  ).trim();
  const library = `/usr/lib/${version}`;
  cpSync(library, join(root, library), {
    recursive: true,
    dereference: true,
    filter: (path) => !/\/(test|tests|__pycache__|idlelib|ensurepip|config-[^/]*)$/.test(path),
  });
  for (const extension of (await must(['sh', '-c', `ls ${library}/lib-dynload/*.so`])).trim().split('\n')) {
    await copyLibraries(extension, root);
  }
  for (const program of ['client.py', 'server.py']) cpSync(join(PEERS, program), join(root, 'programs', program));
  for (const program of ['load.py', 'grpc_health.py']) cpSync(join(PROGRAMS, program), join(root, 'programs', program));
  await must(['gcc', '-Os', '-static', '-o', join(root, 'programs/first'), join(PROGRAMS, 'first.c')]);
  writeFileSync(join(root, 'etc/passwd'), 'root:x:0:0:root:/:/bin/sh\n');
  return pack(directory, TOOLS_IMAGE, root, ['/bin/sleep', 'infinity']);
}

async function copyProgram(path: string, root: string): Promise<void> {
  const real = realpathSync(path);
  const target = join(root, path);
  mkdirSync(dirname(target), { recursive: true });
  cpSync(real, target, { dereference: true });
  await copyLibraries(real, root);
}

async function copyLibraries(path: string, root: string): Promise<void> {
  for (const line of (await must(['ldd', path])).split('\n')) {
    const library = /(\/\S+) \(0x/.exec(line)?.[1];
    if (library === undefined) continue;
    const target = join(root, library);
    if (existsSync(target)) continue;
    mkdirSync(dirname(target), { recursive: true });
    cpSync(realpathSync(library), target);
  }
}
