/** Where the programs of a Kubernetes cluster are: built from their modules into a cache outside the checkout. */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const SCRIPT = fileURLToPath(new URL('../binaries.sh', import.meta.url));

let folder: string | undefined;

/** Path of a cached program. @throws Error that says how to build it when it is not in the cache */
export function binary(name: string): string {
  if (folder === undefined) {
    const found = spawnSync('bash', [SCRIPT, '--cached'], { encoding: 'utf8' });
    if (found.status !== 0) throw new Error(`${found.stderr.trim()}; run: bash test/kubernetes/binaries.sh`);
    folder = found.stdout.trim();
  }
  return join(folder, name);
}
