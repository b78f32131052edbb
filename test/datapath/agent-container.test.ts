/** The agent in a container of a cgroup v2 node: a cgroup namespace of its own, in which all paths of cgroups are relative. */
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it, onTestFinished } from 'vitest';
import { findCgroupRoot } from '../../src/agent/machine.ts';

const DIST = fileURLToPath(new URL('../../dist', import.meta.url));

it('finds the root of cgroup2 and trusts a proxy in the container beside its own', () => {
  const cgroup = join(findCgroupRoot(), `ebbtide-test-${process.pid}`);
  const bpffs = mkdtempSync(join(tmpdir(), 'ebbtide-bpf-'));
  const folders = [cgroup, join(cgroup, 'agent'), join(cgroup, 'proxy')];
  for (const folder of folders) mkdirSync(folder);
  execFileSync('mount', ['-t', 'bpf', 'bpf', bpffs]);
  const proxy = spawn('sleep', ['60']);
  onTestFinished(async () => {
    const ended = new Promise((resolve) => proxy.once('exit', resolve));
    proxy.kill('SIGKILL');
    await ended;
    execFileSync('umount', [bpffs]);
    rmSync(bpffs, { recursive: true });
    for (const folder of folders.reverse()) rmdirSync(folder);
  });
  writeFileSync(join(cgroup, 'proxy/cgroup.procs'), String(proxy.pid));
  const script = `
    import { readFileSync } from 'node:fs';
    import { findCgroupRoot } from '${DIST}/agent/machine.js';
    import { openCapture } from '${DIST}/agent/native-capture.js';
    const cgroup = findCgroupRoot();
    const capture = openCapture({ cgroup, pinDirectory: '${bpffs}/test' });
    try {
      capture.trustProxy(${proxy.pid});
    } finally {
      capture.close({ remove: true });
    }
    console.log(cgroup, /^0::.*/m.exec(readFileSync('/proc/${proxy.pid}/cgroup', 'utf8'))[0]);`;
  const command = 'echo $$ >"$1/agent/cgroup.procs" && exec unshare --cgroup --mount "$2" --input-type=module -e "$3"';
  const said = execFileSync('sh', ['-c', command, 'sh', cgroup, process.execPath, script], { encoding: 'utf8' });
  // It really was in a namespace of its own.
  expect(said.trim()).toBe(`${findCgroupRoot()} 0::/../proxy`);
});
