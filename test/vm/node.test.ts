/** A small node, one processor and 512 MB, with the kernel of a guest: the whole mesh runs on it, and leaves nothing. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readmeExample } from './lib/example.ts';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';

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
awk '$2 != "/run/netns" { print "mount", $2, $3 }' /proc/mounts
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

  it('has room for controller, agent and proxy: mutual TLS, a denial, and nothing is left when they have gone', async () => {
    const before = await guest.must(INVENTORY);
    const { code, stdout, stderr } = await guest.run(readmeExample(), { timeoutMs: 280_000 });
    const logs = async () => (await guest.run('tail -n 5 /tmp/ebbtide-hand/*.log')).stdout;
    const said = `${stdout}\n${stderr}\n${code === 0 ? '' : await logs()}\n${guest.console.slice(-3000)}`;
    expect(code, said).toBe(0);
    expect(stdout, said).toMatch(/^200$/m);
    const counted = stdout.split('\n').filter((line) => line.includes('connection_security_policy="mutual_tls"'));
    expect(counted.join(), said).toMatch(/spiffe:\/\/cluster.local\/ns\/hand\/sa\/client/);
    expect(stderr, said).toMatch(/curl: \(\d+\)/);
    expect(stdout, said).toContain('policy-denied');
    expect(guest.console, said).not.toMatch(/Out of memory|WARNING:|BUG:|Call Trace/);
    // The kernel frees programs and namespaces a little later.
    await expect.poll(() => guest.must(INVENTORY), { timeout: 60_000, interval: 3000 }).toBe(before);
  });
});
