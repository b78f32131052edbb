/** File systems for guests: the machine's Debian userland, the checkout with its packages, and disks that keep state. */
import { createHash } from 'node:crypto';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { must, run } from '../../../src/lab/exec.ts';
import { buildPeerCommand } from '../../datapath/capture/build-peer.ts';
import { packageClosure, packageFiles } from './debian.ts';
import { CHECKOUT, cacheDirectory, makePlace, removePlace } from './place.ts';

/** What the tests of a guest need. Everything else comes as a dependency. */
const PACKAGES = [
  ...['bash', 'coreutils', 'dash', 'diffutils', 'findutils', 'grep', 'sed', 'mawk', 'tar', 'gzip', 'xz-utils'],
  ...['util-linux', 'mount', 'procps', 'psmisc', 'kmod', 'libc-bin', 'hostname', 'perl-base', 'python3', 'e2fsprogs'],
  ...['iproute2', 'iptables', 'nftables', 'tcpdump', 'curl', 'openssl', 'iperf3', 'haproxy'],
  ...['nginx-light', 'redis-server', 'redis-tools', 'openssh-server', 'openssh-client'],
  ...['bpftool', 'libbpf1', 'libstdc++6', 'gcc', 'libc6-dev', 'systemd'],
  ...['apparmor', 'containerd', 'runc'],
] as const;
const UNWANTED = /^\/usr\/(share\/(doc|man|info|locale|lintian|i18n|bug|icons|zoneinfo)|games)\//;
/** Of the machine itself, not of a package. */
const MACHINE_FILES = ['/etc/passwd', '/etc/group', '/etc/nsswitch.conf', '/etc/ld.so.cache'] as const;
/** Links of a machine whose /usr is merged. */
const ROOT_LINKS = ['/bin', '/sbin', '/lib', '/lib64'] as const;
/** Packages of npm that no guest needs, by folder. */
const UNWANTED_PACKAGES = ['@biomejs', '@typescript', 'typescript', 'protobufjs-cli'] as const;
const MIB = 1 << 20;
/** An image that nobody used for a week is removed when another is made. */
const UNUSED_MS = 7 * 24 * 3600 * 1000;

/** Copies by hard links where the cache is on the same file system. */
async function stage(files: readonly string[], from: string, to: string): Promise<void> {
  const list = files.map((each) => `${each}\0`).join('');
  const copy = (how: string) =>
    run(['xargs', '-0', 'cp', '-a', how, '--parents', '-t', to], { input: list, timeoutMs: 300_000, cwd: from });
  if ((await copy('--link')).code === 0) return;
  const copied = await copy('--reflink=auto');
  if (copied.code !== 0) throw new Error(`copying files for a guest: ${copied.stderr.slice(0, 2000)}`);
}

/**
 * An ext4 file system with what is put into a directory. Written elsewhere and moved, so that no half one is ever seen.
 * @param fill puts the content in
 */
async function makeImage(file: string, fill: (directory: string) => Promise<void>): Promise<void> {
  // On the cache's file system, for hard links.
  const place = makePlace(cacheDirectory());
  try {
    const directory = join(place, 'root');
    mkdirSync(directory);
    await fill(directory);
    await imageOf(directory, join(place, 'image'));
    renameSync(join(place, 'image'), file);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EXDEV') throw error;
    await must(['cp', '--sparse=always', join(place, 'image'), file]);
  } finally {
    removePlace(place);
  }
}

async function imageOf(directory: string, file: string): Promise<void> {
  const size = Number((await must(['du', '-sm', '--apparent-size', directory], { timeoutMs: 120_000 })).split('\t')[0]);
  const inodes = (await must(['find', directory, '-printf', '.'], { timeoutMs: 120_000 })).length;
  const megabytes = Math.ceil(size * 1.1 + inodes / 200 + 16);
  await must(
    // Without a journal, a reserve and resizing: nobody ever writes to it.
    [
      ...['mke2fs', '-q', '-F', '-t', 'ext4', '-O', '^has_journal,^resize_inode', '-m', '0', '-b', '4096'],
      ...['-N', `${inodes + 64}`, '-d', directory, file, `${megabytes}M`],
    ],
    { timeoutMs: 600_000 },
  );
}

const making = new Map<string, Promise<string>>();

/** Makes a file of the cache under its name, unless it is there; once, for all guests that start at the same time. */
function cached(prefix: string, key: string, fill: (directory: string) => Promise<void>): Promise<string> {
  const file = join(cacheDirectory(), `${prefix}-${key}.img`);
  const made = making.get(file) ?? make(prefix, file, fill);
  making.set(file, made);
  return made;
}

async function make(prefix: string, file: string, fill: (directory: string) => Promise<void>): Promise<string> {
  const cache = cacheDirectory();
  if (existsSync(file)) {
    utimesSync(file, new Date(), new Date());
    return file;
  }
  for (const name of readdirSync(cache).filter((each) => each.startsWith(`${prefix}-`))) {
    const other = statSync(join(cache, name), { throwIfNoEntry: false });
    if (other && Date.now() - other.mtimeMs > UNUSED_MS) rmSync(join(cache, name), { force: true });
  }
  await makeImage(file, fill);
  return file;
}

function hashOf(...parts: readonly (string | Buffer)[]): string {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part).update('\0');
  return hash.digest('hex').slice(0, 16);
}

/** The root of all guests: this machine's own packages. Cached by their versions. */
export async function userlandImage(say: (text: string) => void = () => {}): Promise<string> {
  const packages = packageClosure(PACKAGES);
  const machine = MACHINE_FILES.filter((each) => existsSync(each));
  const key = hashOf(
    packages.map((each) => `${each.name}=${each.version}`).join('\n'),
    readFileSync(new URL(import.meta.url)),
    readFileSync(new URL('debian.ts', import.meta.url)),
    ...machine.map((each) => readFileSync(each)),
  );
  return cached('userland', key, async (directory) => {
    say(`building the guests' userland from ${packages.length} packages of this machine`);
    for (const link of ROOT_LINKS) {
      if (lstatSync(link, { throwIfNoEntry: false })?.isSymbolicLink())
        symlinkSync(readlinkSync(link), join(directory, link));
    }
    const files = packageFiles(packages, (path) => !UNWANTED.test(path));
    const listed = [...files, ...machine].map((each) => each.slice(1));
    await stage(listed, '/', directory);
    for (const each of ['ebbtide', 'state', 'root', 'tmp', 'var/tmp', 'var/lib/nginx', 'var/log'])
      mkdirSync(join(directory, each), { recursive: true });
    if (!existsSync(join(directory, 'var/run'))) symlinkSync('/run', join(directory, 'var/run'));
    rmSync(join(directory, 'etc/hosts'), { force: true });
    writeFileSync(join(directory, 'etc/hosts'), '127.0.0.1 localhost\n::1 localhost ip6-localhost\n');
  });
}

/** node_modules, as it is in this checkout; cached by npm's record of it. */
export function packagesImage(): Promise<string> {
  const key = hashOf(
    readFileSync(join(CHECKOUT, 'node_modules/.package-lock.json')),
    readFileSync(new URL(import.meta.url)),
  );
  return cached('packages', key, async (directory) => {
    const source = join(CHECKOUT, 'node_modules');
    const entries = readdirSync(source).filter(
      (each) => !(UNWANTED_PACKAGES as readonly string[]).includes(each) && !['.cache', '.vite'].includes(each),
    );
    await stage(
      entries.map((each) => `node_modules/${each}`),
      CHECKOUT,
      directory,
    );
  });
}

/** The peers of the capture tests, built; in the checkout of a guest. */
export const PEER = 'peer';

/** Sources and everything that was built, as they are now. */
export function checkoutImage(file: string): Promise<void> {
  return makeImage(file, async (directory) => {
    const listed = await must(['git', '-C', CHECKOUT, 'ls-files', '-co', '--exclude-standard', '-z']);
    const built = await must(
      [
        ...['find', 'dist', 'bpf/build', 'native/build/Release', 'src/mesh/proto', '-type', 'f'],
        ...['-not', '-path', '*/obj.target/*', '-not', '-path', '*/.deps/*', '-not', '-name', '*.a', '-print0'],
      ],
      { cwd: CHECKOUT },
    );
    const files = [...new Set([...listed.split('\0'), ...built.split('\0')])].filter(
      (each) => each !== '' && existsSync(join(CHECKOUT, each)),
    );
    // Copied, not linked: what is written to while the image is made would else be half in it.
    await must(['xargs', '-0', 'cp', '-a', '--parents', '-t', directory], {
      input: files.map((each) => `${each}\0`).join(''),
      cwd: CHECKOUT,
    });
    // A guest has the machine's libraries, and its compiler would take a quarter of a minute.
    await must(buildPeerCommand(join(directory, PEER)));
  });
}

/** A disk that keeps what is written to it over power cuts: ext4 with a journal. Made where the file is not there. */
export async function stateDisk(file: string, megabytes = 512): Promise<void> {
  if (existsSync(file)) return;
  writeFileSync(file, '');
  truncateSync(file, megabytes * MIB);
  await must(['mke2fs', '-q', '-F', '-t', 'ext4', file]);
}
