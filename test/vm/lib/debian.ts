/** Which files a set of this machine's own Debian packages has, with all that they depend on. */
import { existsSync, lstatSync, readdirSync, readFileSync, readlinkSync, realpathSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';

const DPKG = '/var/lib/dpkg';

export interface InstalledPackage {
  readonly name: string;
  readonly version: string;
  /** Each a list of alternatives. */
  readonly depends: readonly (readonly string[])[];
  readonly files: string;
}

/** Installed packages by every name that they satisfy. */
export function installedPackages(status = readFileSync(join(DPKG, 'status'), 'utf8')): Map<string, InstalledPackage> {
  const result = new Map<string, InstalledPackage>();
  const provided: [string, InstalledPackage][] = [];
  for (const paragraph of status.split('\n\n')) {
    const field = (name: string): string => new RegExp(`^${name}: (.*)$`, 'm').exec(paragraph)?.[1] ?? '';
    if (field('Status') !== 'install ok installed') continue;
    const name = field('Package');
    const names = (text: string): string[][] =>
      text
        .split(',')
        .filter((each) => each.trim() !== '')
        .map((each) => each.split('|').map((one) => one.trim().replace(/[ :(].*$/, '')));
    const files = [`${name}:${field('Architecture')}.list`, `${name}.list`]
      .map((each) => join(DPKG, 'info', each))
      .find((each) => existsSync(each));
    if (files === undefined) continue;
    const found = {
      name,
      version: field('Version'),
      depends: names([field('Pre-Depends'), field('Depends')].filter((each) => each !== '').join(',')),
      files,
    };
    // Of two architectures the first is the machine's own, as dpkg sorts them.
    if (!result.has(name)) result.set(name, found);
    for (const [virtual] of names(field('Provides'))) if (virtual) provided.push([virtual, found]);
  }
  for (const [name, by] of provided) if (!result.has(name)) result.set(name, by);
  return result;
}

/**
 * The packages with what they depend on, sorted by name.
 * @throws Error naming those that are not installed
 */
export function packageClosure(
  wanted: readonly string[],
  installed: ReadonlyMap<string, InstalledPackage> = installedPackages(),
): InstalledPackage[] {
  const missing = wanted.filter((name) => !installed.has(name));
  if (missing.length > 0)
    throw new Error(
      `these packages are not installed: ${missing.join(', ')}; apt-get install them, or run npm run setup`,
    );
  const closure = new Map<string, InstalledPackage>();
  const queue = [...wanted];
  for (let name = queue.pop(); name !== undefined; name = queue.pop()) {
    const found = installed.get(name);
    if (found === undefined || closure.has(found.name)) continue;
    closure.set(found.name, found);
    for (const alternatives of found.depends) {
      const chosen = alternatives.find((each) => installed.has(each));
      if (chosen !== undefined) queue.push(chosen);
    }
  }
  return [...closure.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** Where a file really is: /bin and its like are links into /usr. */
function canonical(path: string): string {
  return join(realpathSync(dirname(path)), basename(path));
}

/** Files and links of the packages by their true paths, with the links of Debian's alternatives and compiled Python. */
export function packageFiles(packages: readonly InstalledPackage[], wanted: (path: string) => boolean): string[] {
  const files = new Set<string>();
  for (const each of packages) {
    for (const path of readFileSync(each.files, 'utf8').split('\n')) {
      if (path === '' || path === '/.' || !wanted(path)) continue;
      // A package may list what somebody removed, or moved for another package.
      const stat = lstatSync(path, { throwIfNoEntry: false });
      // Where /usr is merged the packages' /lib is a link, of nobody.
      const merged = dirname(path) === '/' && stat?.isSymbolicLink() === true;
      if (stat !== undefined && !stat.isDirectory() && !merged) files.add(canonical(path));
    }
  }
  for (const path of [...files]) {
    if (!path.endsWith('.py')) continue;
    const compiled = join(dirname(path), '__pycache__');
    if (!existsSync(compiled) || files.has(compiled)) continue;
    const prefix = `${basename(path, '.py')}.`;
    for (const name of readdirSync(compiled)) if (name.startsWith(prefix)) files.add(join(compiled, name));
  }
  for (const name of readdirSync('/etc/alternatives')) {
    const link = join('/etc/alternatives', name);
    if (lstatSync(link).isSymbolicLink() && files.has(canonical(readlinkSync(link)))) files.add(link);
  }
  for (const directory of ['/usr/bin', '/usr/sbin']) {
    for (const name of readdirSync(directory)) {
      const path = join(directory, name);
      if (lstatSync(path).isSymbolicLink() && files.has(readlinkSync(path))) files.add(path);
    }
  }
  return [...files].sort();
}
