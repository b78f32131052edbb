/** The worked example of the README, to be run in a guest. */
import { readFileSync } from 'node:fs';

/** Its script for one root shell, with pauses for a guest that runs in software. @throws Error where the README has none */
export function readmeExample(): string {
  const readme = readFileSync(new URL('../../../README.md', import.meta.url), 'utf8');
  const script = /## By hand[\s\S]*?```sh\n([\s\S]*?)```/.exec(readme)?.[1];
  if (script === undefined) throw new Error('the README has no example by hand');
  return `set -e\n${script.replaceAll(/^sleep 1$/gm, 'sleep 8')}`;
}
