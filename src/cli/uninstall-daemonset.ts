/** Takes the mesh's DaemonSet out of a cluster while its agents still have their rights, so that they can let all pods go. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Api, ApiError, openApi } from '../mesh/api/index.js';

export interface DaemonSetName {
  readonly namespace: string;
  readonly name: string;
}

const LOOK_MS = 500;

/**
 * Deletes a DaemonSet and waits until its last pod has ended.
 * @param timeoutMs how long it may take
 * @throws ApiError; Error when pods are left after the time
 */
export async function deleteDaemonSet(
  { namespace, name }: DaemonSetName,
  timeoutMs: number,
  api: Api = openApi(),
): Promise<void> {
  const path = `/apis/apps/v1/namespaces/${namespace}/daemonsets/${name}`;
  const deadline = performance.now() + timeoutMs;
  // Foreground: the DaemonSet stays, marked as being deleted, as long as it has pods. By the mark agents know.
  if (!(await found(api, 'DELETE', path, { propagationPolicy: 'Foreground' }))) return;
  while (await found(api, 'GET', path)) {
    if (performance.now() > deadline) {
      throw new Error(`pods of DaemonSet ${namespace}/${name} have not ended within ${timeoutMs / 1000} s`);
    }
    await sleep(LOOK_MS);
  }
}

/** @returns false where there is no such object */
async function found(api: Api, method: string, path: string, body?: object): Promise<boolean> {
  try {
    await api.request(method, path, body === undefined ? {} : { body });
    return true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return false;
    throw error;
  }
}
