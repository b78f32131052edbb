/** Debian's kernels for guests, and the initial memory disk with the modules that mount a guest's disks. */
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { must, run } from '../../../src/lab/exec.ts';
import { cacheDirectory, HARNESS } from './place.ts';

/** Names of kernels: of Debian's oldest supported release, of its stable one, and the newest that it has. */
export const KERNELS = ['6.1', '6.12', 'newest'] as const;
export type KernelName = (typeof KERNELS)[number];

/** A kernel that is ready to be booted. */
export interface Kernel {
  readonly name: KernelName;
  /** As `uname -r` says it. */
  readonly release: string;
  readonly image: string;
  /** File system with its modules. */
  readonly modules: string;
  readonly directory: string;
}

/** Loaded before the root can be mounted; of these, those that the kernel has not built in. */
const EARLY_MODULES = ['virtio_pci', 'virtio_blk', 'virtio_console', 'virtio_rng', 'virtio_net', 'ext4', 'overlay'];

/** Whether {@link findKernel} would find it without a download. */
export async function isKernelCached(name: KernelName): Promise<boolean> {
  return (await run(['bash', join(HARNESS, 'kernels.sh'), '--cached', name])).code === 0;
}

/** The kernel from the cache, downloaded where it is not there. @throws Error with what apt said */
export async function findKernel(name: KernelName): Promise<Kernel> {
  const script = join(HARNESS, 'kernels.sh');
  const directory = (await must(['bash', script, name], { timeoutMs: 600_000 })).trim();
  const release = readFileSync(join(directory, 'release'), 'utf8').trim();
  const [image, modules] = [join(directory, 'vmlinuz'), join(directory, 'modules.img')];
  return { name, release, image, modules, directory };
}

let building: Promise<string> | undefined;

/** The guest's first process, statically linked; built once for all guests of this process. */
export function buildInit(): Promise<string> {
  building ??= compileInit();
  return building;
}

async function compileInit(): Promise<string> {
  const sources = ['init.c', 'serve.c'].map((each) => join(HARNESS, 'guest', each));
  const file = join(cacheDirectory(), 'init');
  const partial = `${file}.${randomUUID()}`;
  await must(['gcc', '-O1', '-static', '-Wall', '-Wextra', '-Werror', '-o', partial, ...sources], {
    timeoutMs: 120_000,
  });
  renameSync(partial, file);
  return file;
}

/** Files of modules by their dependencies, the depended-on first. Of a name that is built in there is no file. */
function moduleFiles(directory: string): string[] {
  const depends = new Map<string, string[]>();
  for (const line of readFileSync(join(directory, 'modules.dep'), 'utf8').split('\n')) {
    const [file, rest = ''] = line.split(':');
    if (file) depends.set(file, rest.trim() === '' ? [] : rest.trim().split(' '));
  }
  const byName = new Map(
    [...depends.keys()].map((file) => [
      basename(file)
        .replace(/\.ko.*$/, '')
        .replaceAll('-', '_'),
      file,
    ]),
  );
  const builtIn = readFileSync(join(directory, 'modules.builtin'), 'utf8');
  const order: string[] = [];
  const add = (file: string): void => {
    if (order.includes(file)) return;
    for (const each of depends.get(file) ?? []) add(each);
    order.push(file);
  };
  for (const name of EARLY_MODULES) {
    const file = byName.get(name);
    if (file !== undefined) add(file);
    else if (!builtIn.includes(`/${name}.ko`)) throw new Error(`${directory} has no module ${name}`);
  }
  // What a module asks for by name only when it is used.
  for (const name of ['crc32c_generic', 'crc32c_intel']) {
    const file = byName.get(name);
    if (file !== undefined) add(file);
  }
  return order;
}

/** One entry of a cpio archive (newc, the kernel's Documentation/driver-api/early-userspace/buffer-format.rst). */
function cpioEntry(name: string, mode: number, data: Buffer, inode: number): Buffer {
  const hex = (value: number): string => value.toString(16).padStart(8, '0');
  const fields = [inode, mode, 0, 0, 1, 0, data.length, 0, 0, 0, 0, name.length + 1, 0];
  const header = Buffer.from(`070701${fields.map(hex).join('')}${name}\0`);
  const pad = (size: number): Buffer => Buffer.alloc((4 - (size % 4)) % 4);
  return Buffer.concat([header, pad(header.length), data, pad(data.length)]);
}

/** The initial memory disk: our first process and the early modules, uncompressed. */
export async function initialDisk(kernel: Kernel, init: string, file: string): Promise<void> {
  const directory = join(kernel.directory, 'modules', kernel.release);
  const entries = [cpioEntry('init', 0o100755, readFileSync(init), 1)];
  const names: string[] = [];
  for (const each of moduleFiles(directory)) {
    const path = join(directory, each);
    const name = basename(each).replace(/\.ko.*$/, '.ko');
    const unpacked = join(kernel.directory, 'early', name);
    if (!existsSync(unpacked)) {
      mkdirSync(dirname(unpacked), { recursive: true });
      const partial = `${unpacked}.${randomUUID()}`;
      const unpack = each.endsWith('.xz') ? 'xz -dc' : each.endsWith('.zst') ? 'zstd -dc' : 'cat';
      await must(['bash', '-c', `${unpack} "$1" >"$2"`, 'bash', path, partial]);
      renameSync(partial, unpacked);
    }
    entries.push(cpioEntry(name, 0o100644, readFileSync(unpacked), entries.length + 1));
    names.push(`/${name}\n`);
  }
  entries.push(cpioEntry('modules.list', 0o100644, Buffer.from(names.join('')), entries.length + 1));
  entries.push(cpioEntry('TRAILER!!!', 0, Buffer.alloc(0), 0));
  writeFileSync(file, Buffer.concat(entries));
}
