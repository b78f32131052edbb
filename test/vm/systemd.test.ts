/** The boot guard as systemd runs it: before whatever starts pods, and what becomes of a boot at which it fails. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { waitFor } from '../../src/lab/index.ts';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';

const GUARD = 'ebbtide-boot-guard.service';
const WAIT = 'ebbtide-boot-guard-wait.service';
const KUBELET = 'kubelet.service';
const PROGRAM = '/opt/ebbtide/bin/ebbtide-boot-guard';
const POD = '5f0c0a52-6d2e-4a57-9a3e-0d8f6f1a2b3c';
/** What a kubelet's unit has, but for the program. */
const KUBELET_UNIT = `[Unit]
Description=Starts a pod
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/bash /ebbtide/test/vm/programs/stand-in-kubelet.sh ${POD}
[Install]
WantedBy=multi-user.target
`;
const CLI = 'node dist/main.js boot-guard';
const FLAGS = '--node node-v.example --boot-guard-daemonset ebbtide-system/ebbtide-node';

describe('systemd', () => {
  let guest: Guest;

  /** systemd has begun all that it is to begin. */
  async function settled(): Promise<void> {
    await waitFor(
      'systemd to have started what it is to start',
      async () => {
        const { stdout } = await guest.run('systemctl is-system-running');
        return ['running', 'degraded'].includes(stdout.trim());
      },
      { timeoutMs: 120_000, intervalMs: 1000 },
    );
  }
  async function show(unit: string): Promise<Record<string, string>> {
    const text = await guest.must(['systemctl', 'show', unit]);
    return Object.fromEntries(text.split('\n').map((line) => [line.split('=')[0], line.slice(line.indexOf('=') + 1)]));
  }
  const first = async (): Promise<string> => (await guest.run('cat /state/first')).stdout.trim();
  async function reboot(): Promise<void> {
    await guest.must('rm -f /state/first /state/first.new; sync');
    await guest.reset();
    await settled();
  }

  /** The one that runs stays as it is. */
  async function breakGuard(): Promise<void> {
    await guest.must(`rm ${PROGRAM}; printf '#!/bin/sh\\nexit 3\\n' >${PROGRAM}; chmod 755 ${PROGRAM}`);
  }

  beforeAll(async () => {
    // One processor: with two, one boot in some fifteen after a reset hung, both spinning, before it had said a word.
    guest = await startGuest({ kernel: chosenKernel(), memoryMb: 1024, cpus: 1, state: true, systemd: true });
    await settled();
    await guest.must('mkdir -p /etc/systemd/system/multi-user.target.wants');
    await guest.must(['tee', `/etc/systemd/system/${KUBELET}`], { input: KUBELET_UNIT });
    await guest.must(`ln -s ../${KUBELET} /etc/systemd/system/multi-user.target.wants/`);
  }, 400_000);
  afterAll(async () => await guest?.dispose());

  it('starts a pod in clear where there is no guard', async () => {
    await reboot();
    expect(await first()).toBe('clear');
  }, 300_000);

  it('finds nothing wrong with the units, and runs the guard before pods: none gets out', async () => {
    expect(await guest.must(`${CLI} install ${FLAGS}`)).toContain(`wrote ${PROGRAM}`);
    const verified = await guest.run(`systemd-analyze verify --man=no ${GUARD} ${WAIT}`);
    expect(verified).toMatchObject({ code: 0 });
    expect(`${verified.stdout}${verified.stderr}`).not.toMatch(/ebbtide/);
    await reboot();
    expect(await first(), guest.console.slice(-2000)).toBe('errno 1');
    const [guard, kubelet] = [await show(GUARD), await show(KUBELET)];
    expect(guard).toMatchObject({ ActiveState: 'active', SubState: 'exited', Result: 'success' });
    expect(kubelet).toMatchObject({ ActiveState: 'active', Result: 'success' });
    expect(Number(guard.ExecMainExitTimestampMonotonic)).toBeLessThan(Number(kubelet.ExecMainStartTimestampMonotonic));
    expect(await show(WAIT)).toMatchObject({ ActiveState: 'active', SubState: 'running' });
    expect(await guest.must(`${CLI} status ${FLAGS}`)).toMatch(/^installed\n.*guarded/s);
  }, 300_000);

  it('starts pods all the same after a guard that failed, and the unit says so', async () => {
    await breakGuard();
    await reboot();
    expect(await first()).toBe('clear');
    expect(await show(GUARD)).toMatchObject({ ActiveState: 'failed', ExecMainStatus: '3' });
    expect(await show(KUBELET)).toMatchObject({ ActiveState: 'active' });
    expect((await guest.run(`${CLI} status ${FLAGS}`)).code).toBe(1);
  }, 300_000);

  it('starts no pod after a guard that failed, where that was asked for', async () => {
    await guest.must(`${CLI} install ${FLAGS} --boot-guard-on-failure stop`);
    await breakGuard();
    await reboot();
    expect(await show(GUARD)).toMatchObject({ ActiveState: 'failed' });
    expect(await show(KUBELET)).toMatchObject({ ActiveState: 'inactive' });
    expect(await first()).toBe('');
  }, 300_000);

  it('knows nothing of it any more once it was removed', async () => {
    await guest.must(`${CLI} remove`);
    expect(await guest.must('ls -A /etc/systemd/system /etc/systemd/system/*.wants; ls -A /opt')).not.toMatch(
      /ebbtide/,
    );
    expect(await show(GUARD)).toMatchObject({ LoadState: 'not-found' });
    await guest.must(`systemctl start ${KUBELET}`);
    expect(await first()).toBe('clear');
  }, 300_000);
});
