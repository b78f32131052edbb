/** Annotations of pods, written as Istio's cni/pkg/util/podutil.go does: by a patch of pods/status, the one right that it takes. */
import type { Api } from '../mesh/api/index.js';

/** Which pod; with its uid one of the same name that came later is not meant (the API refuses with 409). */
export interface AnnotatedPod {
  readonly namespace: string;
  readonly name: string;
  readonly uid?: string;
}

/** Sets an annotation, or takes it off (null). @throws ApiError */
export async function annotatePod(
  api: Api,
  { namespace, name, uid }: AnnotatedPod,
  annotation: string,
  value: string | null,
): Promise<void> {
  await api.request('PATCH', `/api/v1/namespaces/${namespace}/pods/${name}/status`, {
    body: { metadata: { ...(uid === undefined ? {} : { uid }), annotations: { [annotation]: value } } },
    contentType: 'application/merge-patch+json',
    timeoutMs: 10_000,
  });
}
