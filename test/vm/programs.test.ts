/** The BPF programs on the kernel of a guest: all load and attach, each costs the verifier little, and nothing stays. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';

/** Half of what the verifier is ready to process (BPF_COMPLEXITY_LIMIT_INSNS of the kernel's include/linux/bpf_verifier.h). */
const MOST_VERIFIED = 500_000;

interface Objects {
  readonly programs: readonly { readonly id: number; readonly name: string; readonly verified: number }[];
  readonly maps: readonly { readonly id: number; readonly name: string }[];
  readonly links: readonly { readonly id: number }[];
}

declare module 'vitest' {
  interface TaskMeta {
    /** Instructions that the verifier processed, by program. */
    verified?: Readonly<Record<string, number>>;
    /** What this kernel lacks, and what serves instead. */
    lacks?: readonly string[];
  }
}

describe('the BPF programs', () => {
  let guest: Guest;
  beforeAll(async () => {
    guest = await startGuest({ kernel: chosenKernel(), memoryMb: 512, cpus: 1 });
  });
  afterAll(async () => await guest?.dispose());

  async function objects(): Promise<Objects> {
    return JSON.parse(await guest.must(['python3', 'test/vm/programs/bpf-objects.py'])) as Objects;
  }

  async function loaded<T>(guard: 'tcx' | 'clsact', hold: 'hold' | 'off', look: () => Promise<T>): Promise<T> {
    const argv = ['node', '--import', './test/lib/typescript.ts', 'test/vm/programs/load-all.ts', guard, hold];
    const agent = guest.start(argv);
    await agent.said(/"ready":true,"guard":"attached"/, 120_000);
    const seen = await look();
    agent.end();
    expect(await agent.ended, agent.stderr).toBe(0);
    return seen;
  }

  /** Ids are never reused; the kernel frees with a delay. */
  async function nothingSince(before: Objects): Promise<void> {
    const left = async () => {
      const now = await objects();
      return (['programs', 'maps', 'links'] as const).flatMap((kind) =>
        now[kind].filter(({ id }) => !before[kind].some((each) => each.id === id)).map((each) => ({ kind, ...each })),
      );
    };
    await expect.poll(left, { timeout: 60_000, interval: 2000 }).toEqual([]);
    expect(await guest.must('ls /sys/fs/bpf')).not.toMatch(/load-all/);
  }

  it('load, with all that is optional, within half of what the verifier may process, and leave nothing', async (context) => {
    const before = await objects();
    const { programs } = await loaded('tcx', 'hold', objects);
    const ours = programs.filter((each) => each.name.startsWith('ebb_'));
    const verified = Object.fromEntries(ours.map((each) => [each.name, each.verified]));
    context.task.meta.verified = verified;
    expect(ours.length).toBeGreaterThan(12);
    for (const [name, count] of Object.entries(verified)) {
      expect(count, `${name}: instructions processed by the verifier`).toBeGreaterThan(0);
      expect(count, `${name}: instructions processed by the verifier`).toBeLessThan(MOST_VERIFIED);
    }
    await nothingSince(before);
  });

  it('have a guard by tcx where the kernel has that, else by a clsact qdisc, and by the latter where asked', async (context) => {
    const links = () =>
      guest.must('ls /sys/fs/bpf/load-all/*/pods/load-all; tc qdisc show dev ebbloadall; bpftool net');
    const automatic = await loaded('tcx', 'off', links);
    const classic = await loaded('clsact', 'off', links);
    expect(classic).toMatch(/guardtc-/);
    expect(classic).toMatch(/clsact/);
    const byTcx = /^guard-/m.test(automatic);
    if (!byTcx) context.task.meta.lacks = ['tcx (Linux 6.6): the guard is a filter of a clsact qdisc'];
    if (!byTcx) expect(automatic).toMatch(/guardtc-/);
    else expect(automatic).not.toMatch(/clsact/);
    const [major = 0, minor = 0] = guest.kernel.release.split('.').map(Number);
    expect(byTcx, 'tcx is there from Linux 6.6 on').toBe(major > 6 || (major === 6 && minor >= 6));
  });

  it('need BTF to hold new pods, which is said, and capture without it where nothing is held', async () => {
    const load = (hold: string) =>
      guest.run(`echo | node --import ./test/lib/typescript.ts test/vm/programs/load-all.ts tcx ${hold}`);
    await guest.must('mount -t tmpfs none /sys/kernel/btf');
    try {
      const held = await load('hold');
      expect(held.code).not.toBe(0);
      expect(held.stderr).toMatch(/loading BPF object hold: .*this kernel has no BTF .*--hold off/);
      expect(await load('off')).toMatchObject({ code: 0, stdout: expect.stringContaining('"guard":"attached"') });
    } finally {
      await guest.must('umount /sys/kernel/btf');
    }
  });
});
