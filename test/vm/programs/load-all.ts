/**
 * Loads and attaches every BPF program that an agent would, for a pod of its own, and waits for the end of standard input;
 * then takes all away again. Arguments: `tcx` or `clsact`, and `hold` or `off`.
 */
import { execFileSync } from 'node:child_process';
import { openCapture } from '../../../src/agent/native-capture.ts';
import { closeFd, openNetns } from '../../../src/agent/netns.ts';

const [guard, hold] = process.argv.slice(2);
const NAME = 'ebb-load-all';
const ip = (...args: string[]) => execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'inherit'] });

ip('netns', 'add', NAME);
let failed: unknown;
try {
  ip('link', 'add', 'ebbloadall', 'type', 'veth', 'peer', 'name', 'eth0', 'netns', NAME);
  ip('link', 'set', 'ebbloadall', 'up');
  ip('-n', NAME, 'address', 'add', '10.231.9.2/24', 'dev', 'eth0');
  ip('-n', NAME, 'link', 'set', 'eth0', 'up');
  const capture = openCapture({
    cgroup: '/sys/fs/cgroup',
    pinDirectory: '/sys/fs/bpf/load-all',
    classicGuard: guard === 'clsact',
    ...(hold === 'hold' ? { hold: { undecided: 'refuse' } } : {}),
  });
  try {
    const pod = {
      uid: 'load-all',
      netnsFd: openNetns(`/run/netns/${NAME}`),
      addresses: ['10.231.9.2'],
      bypassInbound: false,
    };
    capture.prepare(pod);
    capture.activate(pod);
    process.stdout.write(`${JSON.stringify({ ready: true, guard: capture.status()[0]?.guard })}\n`);
    for await (const _ of process.stdin) {
    }
    closeFd(pod.netnsFd);
  } finally {
    capture.close({ remove: true });
  }
} catch (error) {
  failed = error;
} finally {
  ip('netns', 'delete', NAME);
}
if (failed) throw failed;
