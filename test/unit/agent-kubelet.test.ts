import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import { findKubelet, isRunning } from '../../src/agent/kubelet.ts';
import { Prober } from '../../src/agent/prober.ts';

let proc: string;
beforeEach(() => {
  proc = mkdtempSync(join(tmpdir(), 'agent-kubelet-'));
  for (const name of ['node', 'other', 'pod']) writeFileSync(join(proc, `ns-${name}`), '');
});
afterEach(() => rmSync(proc, { recursive: true, force: true }));

interface Fake {
  readonly netns?: string;
  readonly uid?: number;
  readonly cgroup?: string;
  readonly argv?: readonly string[];
  readonly started?: number;
  /** Inode of a socket that listens on port 10250, and whether the process holds it. */
  readonly socket?: number;
  readonly holds?: boolean;
}
function add(pid: number, fake: Fake = {}): void {
  const { netns = 'node', uid = 0, cgroup = '0::/system.slice/kubelet.service\n', argv = ['kubelet'] } = fake;
  const directory = join(proc, String(pid));
  for (const name of ['ns', 'fd', 'net']) mkdirSync(join(directory, name), { recursive: true });
  symlinkSync(join(proc, `ns-${netns}`), join(directory, 'ns', 'net'));
  writeFileSync(join(directory, 'status'), `Name:\tx\nUid:\t${uid}\t${uid}\t${uid}\t${uid}\n`);
  writeFileSync(join(directory, 'cgroup'), cgroup);
  writeFileSync(join(directory, 'cmdline'), argv.map((each) => `${each}\0`).join(''));
  const zeros = Array.from({ length: 18 }, () => '0').join(' ');
  writeFileSync(join(directory, 'stat'), `${pid} (x) S ${zeros} ${fake.started ?? pid} 0 0\n`);
  const heading = '  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n';
  const listening = (port: string, state: string, inode: number) =>
    `   0: 00000000000000000000000000000000:${port} 0:0000 ${state} 00000000:00000000 00:00000000 00000000  0  0 ${inode} 1\n`;
  const lines = fake.socket === undefined ? '' : listening('280A', '0A', fake.socket);
  writeFileSync(join(directory, 'net', 'tcp'), heading);
  // An established connection from the port, and a listener on another one, are not it.
  writeFileSync(
    join(directory, 'net', 'tcp6'),
    heading + listening('280A', '01', 7) + listening('280B', '0A', 8) + lines,
  );
  symlinkSync('socket:[7]', join(directory, 'fd', '3'));
  symlinkSync('socket:[8]', join(directory, 'fd', '4'));
  if (fake.socket !== undefined && fake.holds !== false) {
    symlinkSync(`socket:[${fake.socket}]`, join(directory, 'fd', '5'));
  }
}
const find = (nodeName = 'node1') => findKubelet({ proc, port: 10250, nodeName })?.pid;

it('is the process that holds the socket which listens on the port', () => {
  add(10, { socket: 55, holds: false, argv: ['sshd'] });
  add(20, { socket: 55 });
  add(30, { netns: 'other' });
  expect(find()).toBe(20);
});

it('is of those that share it the oldest', () => {
  add(40, { socket: 55, started: 9 });
  add(50, { socket: 55, started: 3 });
  expect(find()).toBe(50);
});

it.each([
  ['another user’s', { uid: 1000 }],
  ['a pod’s', { cgroup: '0::/kubepods/besteffort/pod0b2c4d6e-1111-4222-8333-a0b1c2d3e4f5/x\n' }],
  [
    'of two pods by its hierarchies',
    {
      cgroup:
        '2:cpu:/kubepods/pod0b2c4d6e-1111-4222-8333-a0b1c2d3e4f5/x\n0::/kubepods/pod1b2c4d6e-1111-4222-8333-a0b1c2d3e4f5/x\n',
    },
  ],
  ['a thread of the kernel', { argv: [] }],
])('is no process that is %s', (_, fake) => {
  add(20, { socket: 55, ...fake });
  expect(find()).toBeUndefined();
});

it('is where several are on the machine the one whose command line names the node', () => {
  add(20, { socket: 55, argv: ['kubelet', '--hostname-override=node1'] });
  add(30, { socket: 66, netns: 'other', argv: ['kubelet', '--hostname-override=node2'] });
  expect(find('node2')).toBe(30);
  expect(find('node1')).toBe(20);
  expect(find('node')).toBeUndefined();
});

it('is trusted, distrusted when it has ended, and its successor trusted', () => {
  vi.useFakeTimers();
  const calls: string[] = [];
  const capture = {
    trustProber: (pid: number) => void calls.push(`trust ${pid}`),
    distrustProber: (pid: number) => void calls.push(`distrust ${pid}`),
  };
  add(20, { socket: 55 });
  const search = { proc, port: 10250, nodeName: 'n' };
  const prober = new Prober(capture, search, pino({ level: 'silent' }), findKubelet(search));
  vi.advanceTimersByTime(4000);
  expect(calls).toEqual(['trust 20']);
  rmSync(join(proc, '20'), { recursive: true });
  vi.advanceTimersByTime(2000);
  expect(calls).toEqual(['trust 20', 'distrust 20']);
  // Its number, used again.
  add(20, { socket: 77, started: 999 });
  expect(isRunning(search, { pid: 20, startTicks: 20n })).toBe(false);
  vi.advanceTimersByTime(2000);
  expect(calls).toEqual(['trust 20', 'distrust 20', 'trust 20']);
  prober.stop();
  vi.useRealTimers();
});
