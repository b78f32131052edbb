/** Pods by the Kubernetes API: those of this node, and all namespaces. */
import { type Api, Watched } from '../mesh/api/index.js';
import type { Metadata, Namespace, Pod } from '../mesh/kubernetes.js';
import {
  BYPASS_INBOUND_ANNOTATION,
  CONFIG_HASH_ANNOTATION,
  DATAPLANE_MODE_LABEL,
  DNS_CAPTURE_ANNOTATION,
  MIRROR_ANNOTATION,
  REDIRECTION_ANNOTATION,
  SIDECAR_STATUS_ANNOTATION,
} from '../mesh/labels.js';
import type { Logger } from '../mesh/log.js';
import type { NodeObjects, PodSource, SourceListener, SourceProblem } from './source.js';

/**
 * What is kept of annotations. The path of a network namespace is not: in a cluster whoever may make pods could name another
 * pod's by it.
 */
const ANNOTATIONS = [
  BYPASS_INBOUND_ANNOTATION,
  CONFIG_HASH_ANNOTATION,
  DNS_CAPTURE_ANNOTATION,
  MIRROR_ANNOTATION,
  REDIRECTION_ANNOTATION,
  SIDECAR_STATUS_ANNOTATION,
];
/** A watch that is not open for so long is told as a problem, in milliseconds. */
const SILENT_MS = 15_000;

type Values = Readonly<Record<string, string>>;

function only(values: Values | undefined, names: readonly string[]): Values {
  return Object.fromEntries(names.flatMap((name) => (values?.[name] === undefined ? [] : [[name, values[name]]])));
}

function metadataOf({
  name,
  namespace,
  uid,
  labels,
  deletionTimestamp,
  annotations,
  ownerReferences,
}: Metadata): Metadata {
  return {
    name,
    ...(namespace === undefined ? {} : { namespace }),
    ...(uid === undefined ? {} : { uid }),
    ...(deletionTimestamp === undefined ? {} : { deletionTimestamp }),
    labels: only(labels, [DATAPLANE_MODE_LABEL]),
    annotations: only(annotations, ANNOTATIONS),
    ...(ownerReferences === undefined
      ? {}
      : {
          ownerReferences: ownerReferences.map(({ kind, name: owner, controller }) => ({
            kind,
            name: owner,
            ...(controller === undefined ? {} : { controller }),
          })),
        }),
  };
}

/** Reduces a Pod to what the agent reads, in the memory of every node. */
export function pickPod(object: unknown): Pod {
  const { metadata, spec, status } = object as Pod;
  const { uid } = metadata;
  if (typeof uid !== 'string' || uid === '') throw new Error('a Pod without a uid');
  const { nodeName, serviceAccountName, hostNetwork } = spec ?? {};
  const { phase, podIP, podIPs } = status ?? {};
  return {
    metadata: { ...metadataOf(metadata), uid },
    spec: {
      ...(nodeName === undefined ? {} : { nodeName }),
      ...(serviceAccountName === undefined ? {} : { serviceAccountName }),
      ...(hostNetwork === undefined ? {} : { hostNetwork }),
    },
    status: {
      ...(phase === undefined ? {} : { phase }),
      ...(podIP === undefined ? {} : { podIP }),
      ...(podIPs === undefined ? {} : { podIPs: podIPs.map(({ ip }) => ({ ip })) }),
    },
  };
}

export function apiSource(api: Api, nodeName: string, log: Logger): PodSource {
  let listener: SourceListener | undefined;
  let synced = false;
  let scheduled = false;
  let stopped = false;
  const changed = (): void => {
    // What came in one turn of the event loop is told once.
    if (!synced || scheduled || stopped) return;
    scheduled = true;
    setImmediate(() => {
      scheduled = false;
      if (!stopped) listener?.onChange(objects(), true);
    });
  };
  const pods = new Watched<Pod>({
    api,
    path: '/api/v1/pods',
    fieldSelector: `spec.nodeName=${nodeName}`,
    log,
    pick: pickPod,
    changed,
  });
  const namespaces = new Watched<Namespace>({
    api,
    path: '/api/v1/namespaces',
    log,
    pick: ({ metadata }) => ({
      metadata: { name: metadata.name, labels: only((metadata as Metadata).labels, [DATAPLANE_MODE_LABEL]) },
    }),
    changed,
  });
  const objects = (): NodeObjects => ({
    pods: [...pods.items().values()],
    namespaces: [...namespaces.items().values()],
  });
  const lists = { pods, namespaces };
  return {
    start(to) {
      listener = to;
      Promise.all([pods.start(), namespaces.start()]).then(
        () => {
          synced = true;
          changed();
        },
        // Closed before there was a first list.
        () => {},
      );
    },
    get synced() {
      return synced;
    },
    problems() {
      return Object.entries(lists).flatMap(([name, list]): SourceProblem[] => {
        const silentMs = performance.now() - list.heard;
        if (list.watching || (list.heard > 0 && silentMs < SILENT_MS)) return [];
        const since =
          list.heard === 0 ? 'was never heard of' : `was last heard of ${Math.round(silentMs / 1000)} s ago`;
        return [
          { file: api.description, message: `the list of ${name} ${since}; see the log for what the API answers` },
        ];
      });
    },
    stop() {
      stopped = true;
      void pods.close();
      void namespaces.close();
    },
  };
}
