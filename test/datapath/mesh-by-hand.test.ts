/** The README's worked example, run as it stands there. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { leftSince, run, takeInventory } from '../../src/lab/index.ts';

const REPOSITORY = fileURLToPath(new URL('../..', import.meta.url));

it('the example of "By hand" in the README works from one shell and leaves nothing', async () => {
  const before = await takeInventory();
  const readme = readFileSync(`${REPOSITORY}/README.md`, 'utf8');
  const script = /## By hand[\s\S]*?```sh\n([\s\S]*?)```/.exec(readme)?.[1] ?? '';
  const result = await run(['bash', '--norc', '-e', '-c', `cd ${REPOSITORY}\n${script}`], { timeoutMs: 45_000 });
  if (result.code !== 0) await cleanUp();
  const said = `${result.stdout}\n${result.stderr}`;
  expect(result.code, said).toBe(0);
  const lines = result.stdout.split('\n');
  expect(lines, said).toContain('200');
  expect(
    lines.filter(
      (line) =>
        line.includes('spiffe://cluster.local/ns/hand/sa/client') &&
        line.includes('spiffe://cluster.local/ns/hand/sa/server') &&
        line.includes('mutual_tls'),
    ).length,
    said,
  ).toBeGreaterThan(0);
  expect(result.stderr, said).toMatch(/curl: \(\d+\)/);
  expect(result.stdout, said).toContain('policy-denied');
  const hand = (kind: string, name: string) => kind.startsWith('BPF') || name.startsWith('hand');
  expect(await leftSince(before, hand)).toEqual([]);
});

/** What the script's end would have removed, when it did not get there; its processes are gone with its process group. */
async function cleanUp(): Promise<void> {
  for (const argv of [
    ['ip', 'netns', 'delete', 'hand-client'],
    ['ip', 'netns', 'delete', 'hand-server'],
    ['ip', 'link', 'delete', 'hand0'],
    ['umount', '/tmp/ebbtide-hand/bpf'],
    ['rm', '-rf', '/tmp/ebbtide-hand'],
  ]) {
    await run(argv);
  }
}
