/** The harness itself: what tests in guests rely on. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { chosenKernel, type Guest, type GuestOptions, startGuest, Wire } from './lib/index.ts';

describe('a guest', () => {
  const disposed: { dispose(): Promise<void> | void }[] = [];
  afterEach(async () => {
    for (const each of disposed.splice(0).reverse()) await each.dispose();
  });

  async function boot(options: Partial<GuestOptions> = {}): Promise<Guest> {
    const guest = await startGuest({ kernel: chosenKernel(), memoryMb: 512, cpus: 1, ...options });
    disposed.push(guest);
    return guest;
  }

  it('runs commands side by side, tells their ends apart, and ends those that take too long', async () => {
    const guest = await boot();
    const [echo, fails, missing, late, large] = await Promise.all([
      guest.run(['cat'], { input: 'ä to and fro\n' }),
      guest.run('echo no >&2; exit 3'),
      guest.run(['no-such-program']),
      guest.run('echo begun; sleep 1000', { timeoutMs: 1500 }),
      guest.run('head -c 3000000 /dev/zero | tr "\\0" x; wc -c >&2', { input: 'y'.repeat(2_000_000) }),
    ]);
    expect(echo).toEqual({ code: 0, stdout: 'ä to and fro\n', stderr: '' });
    expect(fails).toEqual({ code: 3, stdout: '', stderr: 'no\n' });
    expect(missing.code).toBe(127);
    expect(late).toMatchObject({ code: 124, stdout: 'begun\n' });
    expect(large.stdout).toBe('x'.repeat(3_000_000));
    expect(large.stderr).toBe('2000000\n');
    expect((await guest.run('kill -SEGV $$')).code).toBe(128 + 11);
    expect((await guest.must('pgrep -x sleep || echo none')).trim()).toBe('none');
    expect((await guest.must('cat /proc/sys/kernel/osrelease')).trim()).toBe(guest.kernel.release);
  });

  it('is pure cgroup2 with bpffs and BTF, and has the checkout with what was built', async () => {
    const guest = await boot();
    const mounts = await guest.must(['cat', '/proc/mounts']);
    expect(mounts).toMatch(/^cgroup2 \/sys\/fs\/cgroup cgroup2 /m);
    expect(mounts).not.toMatch(/ cgroup /);
    expect(mounts).toMatch(/^bpf \/sys\/fs\/bpf bpf /m);
    await guest.must('test -r /sys/kernel/btf/vmlinux');
    expect(await guest.must('node dist/main.js --help')).toMatch(/^Usage: ebbtide /);
  });

  it('keeps nothing over a power cut but what was written to the state disk', async () => {
    const guest = await boot({ state: true });
    await guest.must('echo kept >/state/synced; sync; echo lost >/ebbtide/unsaved; echo lost >/etc/unsaved');
    const hanging = guest.run('sleep 1000');
    const told = expect(hanging).rejects.toThrow('reset');
    await guest.reset();
    await told;
    expect(await guest.must('cat /state/synced')).toBe('kept\n');
    expect((await guest.run('ls /ebbtide/unsaved /etc/unsaved')).stdout).toBe('');
    await guest.reset();
    expect(await guest.must('cat /state/synced')).toBe('kept\n');
  });

  it('has its own clock, at each boot', async () => {
    const guest = await boot({ clock: 86_400 });
    for (const _ of ['first', 'second']) {
      const ahead = Number(await guest.must(['date', '+%s'])) - Date.now() / 1000;
      expect(Math.abs(ahead - 86_400)).toBeLessThan(30);
      await guest.reset();
    }
  });

  it('tells a panic at once, with the console', async () => {
    const guest = await boot();
    const panic = guest.run('echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger', { timeoutMs: 60_000 });
    await expect(panic).rejects.toThrow(/Kernel panic/);
    expect(guest.console).toContain('sysrq');
  });

  it('is joined with another by a wire that qemu records, also over a power cut', async () => {
    const files = mkdtempSync(join(tmpdir(), 'ebV-'));
    disposed.push({ dispose: () => rmSync(files, { recursive: true }) });
    const wire = new Wire();
    disposed.push(wire);
    const record = join(files, 'wire.pcap');
    const [first, second] = await Promise.all([
      boot({ hostname: 'node1', networks: [{ wire, record }] }),
      boot({ hostname: 'node2', networks: [{ wire }] }),
    ]);
    const address = (n: number) => `ip address add 10.9.0.${n}/24 dev eth0; ip link set eth0 up`;
    await first.must(address(1));
    const server = first.start(['python3', '-c', SERVER]);
    await server.said(/ready/);
    const ask = (word: string) => ['python3', '-c', CLIENT, word];
    for (const word of ['sesame-before-the-cut', 'sesame-after-the-cut']) {
      await second.must(address(2));
      expect(await second.must(ask(word))).toBe(`${word} back\n`);
      expect(readFileSync(record).includes(word)).toBe(true);
      await second.reset();
    }
    await second.must(address(2));
    await first.link(0, false);
    expect((await second.run(ask('sesame-never'))).code).not.toBe(0);
    await first.link(0, true);
    expect(await second.must(ask('sesame-again'))).toBe('sesame-again back\n');
    expect(readFileSync(record).includes('sesame-never')).toBe(false);
  });
});

const SERVER = `
import socket
server = socket.create_server(("10.9.0.1", 7000))
print("ready", flush=True)
while True:
    peer, _ = server.accept()
    peer.sendall(peer.recv(100) + b" back")
    peer.close()
`;
const CLIENT = `
import socket, sys
peer = socket.create_connection(("10.9.0.1", 7000), 8)
peer.settimeout(8)
peer.sendall(sys.argv[1].encode())
print(peer.makefile().read())
`;
