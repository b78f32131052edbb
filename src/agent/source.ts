/** Where the agent learns of its node's pods: the Kubernetes API, or a folder of manifests. */
import type { Namespace, Pod } from '../mesh/kubernetes.js';

/** What the agent needs of the cluster, at one moment. */
export interface NodeObjects {
  readonly namespaces: readonly Namespace[];
  /** Those of this node; others may be among them. */
  readonly pods: readonly Pod[];
}

/** Something wrong with what is read: of a file, or of the API. */
export interface SourceProblem {
  readonly file: string;
  readonly line?: number;
  readonly message: string;
}

export interface SourceListener {
  /**
   * Called with each whole state that differs from the one before, or whose completeness does.
   * @param complete false while something cannot be read: a pod that is not there may be in it
   */
  onChange(objects: NodeObjects, complete: boolean): void;
}

export interface PodSource {
  /**
   * Begins to read and to watch. Nothing is told before the first whole state is known, however long that takes.
   * @throws Error where that can never be, such as for a folder that does not exist
   */
  start(listener: SourceListener): void;
  /** Whether a whole state was told. */
  readonly synced: boolean;
  /** What is wrong now. */
  problems(): readonly SourceProblem[];
  stop(): void;
}
