/** `ebbtide check` on the kernel of a guest with 512 MB: it can run, what the kernel lacks is named, what is taken away is found. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Finding } from '../../src/cli/check/finding.ts';
import { OF_CAPTURE } from '../lib/check-codes.ts';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';

/** Possible on every kernel that is tested, besides what capture itself needs. */
const REQUIRED = [...OF_CAPTURE, 'BTF', 'HOLD', 'CGROUP_PROGRAMS'] as const;

describe('ebbtide check', () => {
  let guest: Guest;
  beforeAll(async () => {
    guest = await startGuest({ kernel: chosenKernel(), memoryMb: 512, cpus: 1 });
  });
  afterAll(async () => await guest?.dispose());

  async function check(
    prefix = '',
  ): Promise<{ code: number; text: string; of(code: string): Finding; all: Finding[] }> {
    const { code, stdout, stderr } = await guest.run(`${prefix} node dist/main.js check --output json`, {
      timeoutMs: 120_000,
    });
    const all = stdout.startsWith('[') ? (JSON.parse(stdout) as Finding[]) : [];
    const of = (wanted: string): Finding => {
      const found = all.find((each) => each.code === wanted);
      if (found === undefined) throw new Error(`no ${wanted} in ${stdout}${stderr}`);
      return found;
    };
    return { code, text: stdout + stderr, of, all };
  }

  const objects = () => guest.must(['python3', 'test/vm/programs/bpf-objects.py']);

  it('finds that this kernel can run it, names what it lacks, and leaves nothing', async (context) => {
    const before = await objects();
    const { code, text, of, all } = await check();
    expect(code, text).toBe(0);
    for (const each of REQUIRED) expect(of(each), text).toMatchObject({ code: each, result: 'ok' });
    expect(of('KERNEL_RELEASE').seen).toContain(guest.kernel.release);
    context.task.meta.lacks = all
      .filter(({ result }) => result === 'warning')
      .map(({ code, seen }) => `${code}: ${seen}`);
    const [major = 0, minor = 0] = guest.kernel.release.split('.').map(Number);
    const tcx = major > 6 || (major === 6 && minor >= 6);
    expect(of('GUARD_LINK')).toMatchObject(
      tcx ? { result: 'ok' } : { result: 'warning', seen: expect.stringMatching(/clsact works/) },
    );
    await expect.poll(objects, { timeout: 60_000, interval: 2000 }).toBe(before);
  });

  it('warns where there is no BTF: new pods cannot be held', async () => {
    await guest.must('mount -t tmpfs none /sys/kernel/btf');
    try {
      const { code, text, of } = await check();
      expect(code, text).toBe(0);
      expect(of('BTF')).toMatchObject({ result: 'warning', hint: expect.stringMatching(/./) });
      expect(of('HOLD').result).not.toBe('ok');
      expect(of('CAPTURE_PROGRAMS').result).toBe('ok');
    } finally {
      await guest.must('umount /sys/kernel/btf');
    }
  });

  it('fails where cgroup2 is not mounted, and where the right to load programs is missing', async () => {
    const away = await check('unshare -m sh -c \'umount /sys/fs/cgroup && exec "$@"\' sh');
    expect(away.code, away.text).toBe(1);
    expect(away.of('CGROUP_ROOT')).toMatchObject({ result: 'failed', hint: expect.stringMatching(/./) });
    const poor = await check('setpriv --bounding-set -bpf,-sys_admin --inh-caps -bpf,-sys_admin');
    expect(poor.code, poor.text).toBe(1);
    expect(poor.of('CAPABILITIES')).toMatchObject({
      result: 'failed',
      seen: expect.stringMatching(/CAP_BPF|CAP_SYS_ADMIN/),
    });
  });

  it('cannot check as somebody who is not root', async () => {
    const { code, text } = await check('setpriv --reuid 65534 --clear-groups');
    expect(code, text).toBe(2);
  });
});
