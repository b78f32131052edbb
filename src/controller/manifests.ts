/** A folder of manifests as the controller's source of objects. */
import type { Logger } from '../mesh/log.js';
import { ManifestSource } from '../mesh/manifests.js';
import type { ObjectSource } from './controller.js';
import type { ClusterObjects } from './objects.js';

/** How often a start that waits for its folder looks and says so, in milliseconds. */
const WAIT_LOOK_MS = 100;
const WAIT_SAY_MS = 10_000;

/**
 * Objects of a folder. While running, a bad file leaves its last good state; at the start there is none, and what it holds
 * may be the policy that protects something. So the first state is handed on only once every file can be read: proxies
 * go on with what they have meanwhile.
 */
export function manifestSource(directory: string, log: Logger): ObjectSource {
  let latest: ClusterObjects | undefined;
  let listener: ((objects: ClusterObjects) => void) | undefined;
  let stopped = false;
  const source = new ManifestSource(directory, log, {
    onChange(objects) {
      latest = objects;
      listener?.(objects);
    },
  });
  return {
    async start(changed) {
      source.start();
      let said = Number.NEGATIVE_INFINITY;
      while (!stopped && (latest === undefined || source.problems().length > 0)) {
        const now = performance.now();
        if (now - said >= WAIT_SAY_MS) {
          said = now;
          log.error(
            { event: 'waiting_for_manifests', problems: source.problems() },
            'not serving yet: mend or remove the manifests that cannot be read',
          );
        }
        await new Promise((resolve) => setTimeout(resolve, WAIT_LOOK_MS));
      }
      if (stopped || latest === undefined) throw new Error('stopped before all manifests could be read');
      listener = changed;
      return latest;
    },
    locate: (object) => source.locate(object),
    close() {
      stopped = true;
      source.stop();
    },
  };
}
