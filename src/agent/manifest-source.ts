/** Pods by a folder of manifests. */
import type { ObjectSet } from '../mesh/kubernetes.js';
import type { Logger } from '../mesh/log.js';
import { ManifestSource } from '../mesh/manifests.js';
import type { PodSource, SourceListener } from './source.js';

export function manifestSource(folder: string, log: Logger): PodSource {
  let objects: ObjectSet | undefined;
  let listener: SourceListener | undefined;
  const tell = (): void => {
    if (objects !== undefined) listener?.onChange(objects, source.complete);
  };
  const source: ManifestSource = new ManifestSource(folder, log, {
    onChange: (changed) => {
      objects = changed;
      tell();
    },
    // A file that is mended without a change of objects lets go what was kept for its sake.
    onMended: tell,
  });
  return {
    start(to) {
      listener = to;
      source.start();
    },
    get synced() {
      return objects !== undefined;
    },
    problems: () => source.problems(),
    stop: () => source.stop(),
  };
}
