/** The engine's own tests (gtest, without Node), each one a test here. Built first, which takes a minute or two. */
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { must, run } from '../../src/lab/exec.ts';

const directory = fileURLToPath(new URL('.', import.meta.url));
const binary = `${directory}/build/release/native_test`;
const BUILD_TIMEOUT_MS = 900_000;

process.stdout.write('building the native tests (make -C test/native)\n');
await must(['make', '-s', '-C', directory, '-j2', 'all'], { timeoutMs: BUILD_TIMEOUT_MS });

/** gtest's list: a suite's name with a dot, then its tests, indented; parameters after a '#'. */
function names(list: string): string[] {
  const found: string[] = [];
  let suite = '';
  for (const line of list.split('\n')) {
    const name = line.split('#')[0]?.trimEnd() ?? '';
    if (/^\S+\.$/.test(name)) suite = name;
    else if (name.startsWith('  ')) found.push(suite + name.trim());
  }
  return found;
}

describe('native', async () => {
  const tests = names(await must([binary, '--gtest_list_tests']));
  it('has tests', () => expect(tests.length).toBeGreaterThan(0));
  for (const name of tests) {
    it(name, async () => {
      const result = await run([binary, `--gtest_filter=${name}`, '--gtest_brief=1'], { timeoutMs: 120_000 });
      expect(result.code, `${result.stdout}\n${result.stderr}`.slice(-4000)).toBe(0);
    }, 130_000);
  }
});
