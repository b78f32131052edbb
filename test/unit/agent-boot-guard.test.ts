import { execFileSync } from 'node:child_process';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { inspect, install, readBootReport, remove, UnsuitableNode } from '../../src/agent/boot-guard/index.ts';
import { type RawBootGuard, readBootGuard } from '../../src/agent/boot-guard/settings.ts';
import { GUARD_UNIT, KUBELET_UNITS, units, WAIT_UNIT } from '../../src/agent/boot-guard/units.ts';

const UNITS = '/etc/systemd/system';
const raw: RawBootGuard = {
  bootGuardOnFailure: 'continue',
  bootGuardReleaseAfter: '600',
  bootGuardExec: '/opt/ebbtide/bin',
};
const facts = {
  nodeName: 'node-1.example',
  bpffs: '/sys/fs/bpf',
  runDirectory: '/var/run/ztunnel',
  ownPod: { name: 'ebbtide-node-x7k2p', namespace: 'ebbtide-system' },
};
const options = readBootGuard(raw, facts);

describe('the boot guard on a node', () => {
  let root: string;
  let executable: string;
  const tree = (): string => execFileSync('find', [root, '-printf', '%P %y %m %l\n'], { encoding: 'utf8' });

  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), 'ebb-root-'));
    executable = join(root, 'built');
    writeFileSync(executable, 'program');
    mkdirSync(join(root, UNITS), { recursive: true });
    mkdirSync(join(root, 'opt'));
  });
  afterEach(() => rmSync(root, { recursive: true, force: true }));

  it('is an executable, two units and the links that start them, and nothing is left when it is taken away', () => {
    const empty = tree();
    const written = install(root, options, executable);
    expect(written).toContain('/opt/ebbtide/bin/ebbtide-boot-guard');
    expect(statSync(join(root, '/opt/ebbtide/bin/ebbtide-boot-guard')).mode & 0o777).toBe(0o755);
    expect(readlinkSync(join(root, UNITS, 'kubelet.service.wants', GUARD_UNIT))).toBe(`../${GUARD_UNIT}`);
    expect(existsSync(join(root, UNITS, 'multi-user.target.wants', WAIT_UNIT))).toBe(true);
    expect(inspect(root, options, executable)).toEqual({ state: 'installed', lacking: [] });
    expect(install(root, options, executable)).toEqual([]);
    expect(remove(root, options.execDirectory).length).toBe(written.length);
    expect(tree()).toBe(empty);
    expect(remove(root, options.execDirectory)).toEqual([]);
    expect(inspect(root, options, executable).state).toBe('not installed');
  });

  it('is updated: another program, other settings, and a kubelet that no longer depends on it', () => {
    const stop = { ...options, onFailure: 'stop' } as const;
    install(root, stop, executable);
    expect(lstatSync(join(root, UNITS, 'kubelet.service.requires', GUARD_UNIT)).isSymbolicLink()).toBe(true);
    writeFileSync(executable, 'newer');
    expect(inspect(root, stop, executable)).toMatchObject({
      state: 'partly',
      lacking: [expect.stringMatching(/differs/)],
    });
    install(root, options, executable);
    expect(existsSync(join(root, UNITS, 'kubelet.service.requires'))).toBe(false);
    expect(readFileSync(join(root, '/opt/ebbtide/bin/ebbtide-boot-guard'), 'utf8')).toBe('newer');
    expect(inspect(root, options, executable).state).toBe('installed');
  });

  it('says on which nodes it cannot be', () => {
    rmSync(join(root, UNITS), { recursive: true });
    expect(() => install(root, options, executable)).toThrow(UnsuitableNode);
    expect(() => install(root, options, executable)).toThrow(/systemd \(Talos\)/);
    expect(() => install(root, options, join(root, 'nowhere'))).toThrow(/npm run build/);
  });

  it('says so where the file system is read-only', () => {
    const program = `mount -t tmpfs none "$1" && mkdir -p "$1${UNITS}" "$1/opt" && mount -o remount,ro "$1" && shift && exec "$@"`;
    const main = fileURLToPath(new URL('../../dist/main.js', import.meta.url));
    const argv = [process.execPath, main, 'boot-guard', 'install', '--host-root', root, '--node', 'n'];
    const ran = (): string =>
      execFileSync('unshare', ['-m', 'sh', '-c', program, 'sh', root, ...argv], { encoding: 'utf8' });
    expect(ran).toThrow(/cannot be written to .*Bottlerocket/);
  });

  it('is started before whatever starts pods, and stops the kubelet only where that is asked for', () => {
    const guard = units(options)[GUARD_UNIT] ?? '';
    const ordered = /^Before=(.*)$/m.exec(guard)?.[1]?.split(' ') ?? [];
    expect(ordered).toEqual(expect.arrayContaining([...KUBELET_UNITS, 'containerd.service', 'crio.service']));
    expect(guard).toMatch(/^TimeoutStartSec=\d+$/m);
    expect(guard).toContain(`WantedBy=${KUBELET_UNITS.join(' ')}`);
    expect(units({ ...options, onFailure: 'stop' })[GUARD_UNIT]).toContain(`RequiredBy=${KUBELET_UNITS.join(' ')}`);
    expect(units(options)[WAIT_UNIT]).toContain('--daemonset ebbtide-system/ebbtide-node --release-after 600');
    expect(() => units({ ...options, bpffs: '/sys/fs/b pf' })).toThrow(/unit/);
  });
});

describe('settings of the boot guard', () => {
  it('never free a node of which no DaemonSet is known', () => {
    const { ownPod, ...alone } = facts;
    expect(options).toMatchObject({ daemonSet: `${ownPod.namespace}/ebbtide-node`, releaseAfter: 600 });
    expect(readBootGuard(raw, alone).releaseAfter).toBe('never');
    expect(readBootGuard({ ...raw, bootGuardDaemonset: 'a/b' }, alone)).toMatchObject({
      daemonSet: 'a/b',
      releaseAfter: 600,
    });
  });
  it.each([
    [{ bootGuardReleaseAfter: '-1' }, /release-after/],
    [{ bootGuardReleaseAfter: '1h' }, /release-after/],
    [{ bootGuardDaemonset: 'a' }, /NAMESPACE\/NAME/],
  ])('refuse %j', (wrong, message) => expect(() => readBootGuard({ ...raw, ...wrong }, facts)).toThrow(message));
});

it('a report counts for its own boot only', () => {
  const directory = mkdtempSync(join(tmpdir(), 'ebb-run-'));
  try {
    expect(readBootReport(directory)).toBeUndefined();
    const report = { state: 'guarded', message: '', bootId: 'now', uptimeSeconds: 4.2 };
    writeFileSync(join(directory, 'boot-guard.json'), JSON.stringify(report));
    expect(readBootReport(directory, 'now')).toEqual(report);
    expect(readBootReport(directory, 'another')).toBeUndefined();
    writeFileSync(join(directory, 'boot-guard.json'), '{');
    expect(readBootReport(directory, 'now')).toBeUndefined();
  } finally {
    rmSync(directory, { recursive: true });
  }
});
