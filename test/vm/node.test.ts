/** A small node, one processor and 512 MB, with the kernel of a guest: the whole mesh runs on it, and leaves nothing. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';
import { guestEnvironment } from './lib/suite.ts';

/** Everything that a mesh, or a lab for it, could leave behind; one thing a line. */
const INVENTORY = `
python3 test/vm/programs/bpf-objects.py | python3 -c '
import json, sys
for kind, objects in json.load(sys.stdin).items():
    for each in objects:
        if kind == "links" or each["name"].startswith("ebb_"): print("bpf", kind, each)'
find /sys/fs/bpf -mindepth 1 | sed 's/^/pin /'
find /sys/fs/cgroup -mindepth 1 -type d | sed 's/^/cgroup /'
ls /run/netns | sed 's/^/namespace /'
ls /run/ebbtide-lab /var/lib/ebbtide-lab 2>/dev/null | sed 's/^/lab /'
ip -br link | sed 's/ .*//; s/^/interface /'
tc qdisc show | grep clsact
nft list ruleset
awk '{ print "mount", $2, $3 }' /proc/mounts
for process in /proc/[0-9]*; do
  [ "$(readlink $process/exe)" ] && tr '\\0' ' ' <$process/cmdline | sed 's/^/process /; s/$/\\n/'
done | grep -v -e INVENTORY -e ' bash -c' -e '^process /init' -e '^process $'
true # INVENTORY`;

describe('a node with one processor and 512 MB', () => {
  let guest: Guest;
  beforeAll(async () => {
    guest = await startGuest({ kernel: chosenKernel(), memoryMb: 512, cpus: 1 });
  });
  afterAll(async () => await guest?.dispose());

  it('runs the demo, two nodes with a controller and encrypted traffic, and leaves nothing', {
    timeout: 700_000,
  }, async () => {
    const before = await guest.must(INVENTORY);
    const demo = await guest.run(['node', 'dist/main.js', 'demo'], {
      timeoutMs: 580_000,
      env: guestEnvironment(guest),
    });
    expect(demo.code, `${demo.stdout}\n${demo.stderr}\n${guest.console.slice(-3000)}`).toBe(0);
    expect(guest.console).not.toMatch(/Out of memory|WARNING:|BUG:|Call Trace/);
    // The kernel frees programs and namespaces a little later.
    await expect.poll(() => guest.must(INVENTORY), { timeout: 60_000, interval: 3000 }).toBe(before);
  });
});
