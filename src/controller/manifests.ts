/** A folder of manifests as the controller's source of objects. */
import { resolve } from 'node:path';
import type { AuthorizationPolicy } from '../mesh/kubernetes.js';
import { ROOT_NAMESPACE } from '../mesh/labels.js';
import type { Logger } from '../mesh/log.js';
import { ManifestSource } from '../mesh/manifests.js';
import type { ObjectSource } from './controller.js';
import { LastGood } from './last-good.js';
import type { ClusterObjects } from './objects.js';

/** How often it is said that everything is refused, and why. */
const SAY_MS = 10_000;

/** In force while a policy may be in a file that nobody could ever read; its name is what the access log shows. */
const REFUSE_ALL: AuthorizationPolicy = {
  metadata: { name: 'ebbtide-unreadable-manifest', namespace: ROOT_NAMESPACE },
  spec: { action: 'DENY', rules: [{}] },
};

/**
 * Objects of a folder. A bad file leaves its last good state, which also outlives the controller (in the data directory).
 * Where nothing good of it is known, because the file is new, everything else is served without it: it was not in force
 * before either. At the very first start, however, nothing was in force before, and a file that cannot be read may hold
 * the policy that protects something: while one mentions a policy, all connections are refused.
 * @param data the data directory
 */
export function manifestSource(directory: string, data: string, log: Logger): ObjectSource {
  let listener: ((objects: ClusterObjects) => void) | undefined;
  let latest: ClusterObjects | undefined;
  let source: ManifestSource | undefined;
  let lastGood: LastGood | undefined;
  let firstStart = false;
  let timer: NodeJS.Timeout | undefined;

  const state = (): ClusterObjects => {
    const objects = latest;
    if (objects === undefined) throw new Error('the folder of manifests was not read');
    if (!firstStart || source === undefined) return objects;
    const unknown = source.unknownPolicies();
    if (unknown.length === 0) {
      firstStart = false;
      clearInterval(timer);
      return objects;
    }
    return { ...objects, authorizationPolicies: [REFUSE_ALL, ...objects.authorizationPolicies] };
  };
  const changed = (): void => {
    listener?.(state());
    // What is refused altogether is no good state to come back to.
    if (!firstStart && source !== undefined) lastGood?.remember(() => source?.texts() ?? new Map());
  };
  return {
    async start(onChange) {
      lastGood = new LastGood(data, resolve(directory), log);
      firstStart = lastGood.texts === undefined;
      source = new ManifestSource(
        directory,
        log,
        {
          onChange(objects) {
            latest = objects;
            changed();
          },
          onProblem: () => changed(),
          onMended: () => changed(),
        },
        lastGood.texts,
      );
      source.start();
      const first = state();
      if (firstStart) {
        const say = (): void =>
          log.error(
            { event: 'refusing_all', files: source?.unknownPolicies() },
            'all connections are refused: mend or remove the manifests that cannot be read, one may hold a policy',
          );
        say();
        timer = setInterval(say, SAY_MS);
      }
      listener = onChange;
      changed();
      return first;
    },
    locate: (object) => source?.locate(object),
    close() {
      clearInterval(timer);
      source?.stop();
      lastGood?.flush();
    },
  };
}
