/**
 * Under the profile that a container runtime gives to containers that ask for none, as the runtime itself loads it: proxy and
 * controller do what they are for, the agent does not and says why. The rights of each are those of its container in the chart.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Finding } from '../../src/cli/check/finding.ts';
import { readmeExample } from './lib/example.ts';
import { chosenKernel, type Guest, startGuest } from './lib/index.ts';

/** Name under which containerd loads it for Kubernetes. */
const PROFILE = 'cri-containerd.apparmor.d';
const CONFINED = `aa-exec -p ${PROFILE} --`;
const AS_AGENT = 'setpriv --bounding-set=-all,+bpf,+net_admin,+sys_admin,+sys_ptrace';
const AS_PROXY = 'setpriv --regid 1337 --clear-groups --bounding-set=-all,+net_admin,+sys_admin';
const AS_CONTROLLER = 'setpriv --reuid 65532 --regid 65532 --clear-groups --bounding-set=-all --inh-caps=-all';
const SLOW_MS = 120_000;

/** A container of containerd with the machine's own programs; it tells by which profile it is confined. */
const CONTAINER = `set -e
# What the package does not have but makes when it is installed is not in a guest.
mkdir -p /etc/apparmor.d/tunables/{home,multiarch,xdg-user-dirs}.d
mount -t securityfs securityfs /sys/kernel/security
mkdir -p /run/runtime/root/{usr,proc,sys,dev}
for each in bin lib lib64; do ln -s usr/$each /run/runtime/root/$each; done
cat >/run/runtime/config.toml <<'TOML'
version = 2
root = "/run/runtime/content"
state = "/run/runtime/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "/run/runtime/socket"
TOML
containerd --config /run/runtime/config.toml >/run/runtime/log 2>&1 &
trap 'kill $!; wait' EXIT
until ctr --address /run/runtime/socket version >/dev/null 2>&1; do kill -0 $!; sleep 0.5; done
ctr --address /run/runtime/socket run --rm --rootfs --apparmor-default-profile ${PROFILE} \\
  --mount type=bind,src=/usr,dst=/usr,options=rbind:ro /run/runtime/root told /usr/bin/cat /proc/self/attr/current`;

/** Replaces what must be there. */
function put(text: string, from: string, to: string): string {
  if (!text.includes(from)) throw new Error(`the example has no ${from}`);
  return text.replaceAll(from, () => to);
}

/** The example on the machine's own bpffs, controller and proxy confined, the agent not, each with its rights. */
function confinedExample(): string {
  const controller = `${AS_CONTROLLER} ${CONFINED} dist/main.js controller`;
  const proxy = `${AS_PROXY} ${CONFINED} dist/main.js proxy`;
  const tell = `for each in $(jobs -p); do echo "$(cat /proc/$each/attr/current): $(tr '\\0' ' ' </proc/$each/cmdline)"; done`;
  let script = readmeExample();
  script = put(script, 'dist/main.js controller', `chown 65532:65532 $hand/data\n${controller}`);
  // As the kubelet gives it: a token that the proxy may read, which has no right to pass over modes of files.
  const token = 'until [ -e $AUTH_TOKEN ]; do sleep 0.1; done';
  script = put(script, token, `${token}\nchmod -R a+rX $hand/data`);
  script = put(script, 'dist/main.js agent', `${AS_AGENT} dist/main.js agent`);
  script = put(script, 'dist/main.js proxy', proxy);
  script = put(script, '$hand/bpf', '/sys/fs/bpf');
  return put(script, '# The end', `${tell}\n# The end`);
}

describe("containers' default profile of AppArmor", () => {
  let guest: Guest;
  let told = '';
  beforeAll(async () => {
    guest = await startGuest({
      kernel: chosenKernel(),
      memoryMb: 768,
      cpus: 1,
      cmdline: 'apparmor=1 security=apparmor',
    });
    // Without the profile nothing here would show anything.
    told = await guest.must(CONTAINER, { timeoutMs: SLOW_MS });
  });
  afterAll(async () => await guest?.dispose());

  async function check(prefix: string) {
    const result = await guest.run(`${prefix} node dist/main.js check --output json`, { timeoutMs: SLOW_MS });
    const all = JSON.parse(result.stdout) as Finding[];
    return { ...result, of: (code: Finding['code']) => all.find((each) => each.code === code) };
  }

  it('is loaded by containerd, and refuses what it is known to', async () => {
    expect(told).toBe(`${PROFILE} (enforce)\n`);
    expect(await guest.must(`${CONFINED} cat /proc/self/attr/apparmor/current`)).toBe(`${PROFILE} (enforce)\n`);
    for (const refused of ['mkdir /sys/fs/bpf/tried', 'readlink /proc/1/ns/net']) {
      const { code, stderr } = await guest.run(`${CONFINED} ${refused}`);
      expect(stderr, refused).toMatch(/Permission denied|^$/);
      expect(code, refused).not.toBe(0);
      await guest.must(refused);
    }
    await guest.must('rmdir /sys/fs/bpf/tried');
  });

  it('keeps the agent from pinning, which says so and leaves nothing', async () => {
    const { code, stdout, stderr } = await guest.run(
      `mkdir -p /tmp/none && ${AS_AGENT} ${CONFINED} dist/main.js agent --manifests /tmp/none`,
      { timeoutMs: SLOW_MS, env: { NODE_NAME: 'refused', INPOD_UDS: '/tmp/refused.sock' } },
    );
    expect(code, stderr).toBe(1);
    const last = JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as { event: string; msg: string };
    expect(last).toMatchObject({ event: 'failed', msg: expect.stringMatching(/\/sys\/fs\/bpf.*Permission denied/) });
    expect(last.msg).toContain(`AppArmor enforces profile ${PROFILE}`);
    expect(last.msg).toContain('appArmorProfile: {type: Unconfined}');
    expect(await guest.must('ls /sys/fs/bpf; bpftool link list')).toBe('');
  });

  it('is found by ebbtide check', async () => {
    const confined = await check(`${AS_AGENT} ${CONFINED}`);
    expect(confined.code, confined.stdout).toBe(1);
    expect(confined.of('APPARMOR')).toMatchObject({ result: 'warning', seen: expect.stringContaining(PROFILE) });
    expect(confined.of('APPARMOR')?.hint).toContain('Unconfined');
    expect(confined.of('BPFFS')).toMatchObject({ result: 'failed', hint: expect.stringContaining('APPARMOR') });
    const free = await check(AS_AGENT);
    expect(free.code, free.stdout).toBe(0);
    expect(free.of('APPARMOR')).toMatchObject({ result: 'ok' });
    expect(free.of('BPFFS')).toMatchObject({ result: 'ok' });
  });

  it('lets proxy and controller carry a request and deny one, with an agent that is not confined', async () => {
    const { code, stdout, stderr } = await guest.run(confinedExample(), { timeoutMs: 280_000 });
    const logs = code === 0 ? '' : (await guest.run('tail -n 5 /tmp/ebbtide-hand/*.log; dmesg | tail -n 20')).stdout;
    const said = `${stdout}\n${stderr}\n${logs}`;
    expect(code, said).toBe(0);
    expect(stdout, said).toMatch(/^200$/m);
    expect(stdout, said).toContain('connection_security_policy="mutual_tls"');
    expect(stdout, said).toContain('policy-denied');
    const profileOf = (command: string) => new RegExp(`^(.*): .*dist/main\\.js ${command}`, 'm').exec(stdout)?.[1];
    expect(profileOf('controller'), said).toBe(`${PROFILE} (enforce)`);
    expect(profileOf('proxy'), said).toBe(`${PROFILE} (enforce)`);
    expect(profileOf('agent'), said).toBe('unconfined');
  });
});
