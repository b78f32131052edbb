/** The controller of a cluster: its source, its trust, and what one replica of several writes. */
import { type Api, openApi, type WatchedOptions } from '../../mesh/api/index.js';
import { ClockSkew, HARMFUL_SKEW_MS } from '../../mesh/clock-skew.js';
import type { Logger } from '../../mesh/log.js';
import type { Authority } from '../authority.js';
import { type RunningController, startController, type Trust } from '../controller.js';
import type { ClusterSettings } from '../settings.js';
import { ClusterCallers } from './callers.js';
import { Election, type LeaseTimes } from './lease.js';
import { ClusterRoot } from './root.js';
import { RootDistribution } from './root-distribution.js';
import { clusterSource } from './source.js';
import { StatusWriter } from './status.js';

const LEASE = 'ebbtide-controller';

export interface ClusterController extends RunningController {
  readonly leading: boolean;
  readonly authority: Authority;
}

/** Times that tests make shorter. */
export interface ClusterTimes {
  readonly watch?: WatchedOptions<unknown>['times'];
  readonly lease?: Partial<LeaseTimes>;
  readonly retryMs?: number;
}

/**
 * Starts it. Resolves once it listens, which takes as long as the API takes to be there.
 * @param signal gives up a start that waits
 * @throws Error where it cannot start
 */
export async function startClusterController(
  settings: ClusterSettings,
  log: Logger,
  signal?: AbortSignal,
  times: ClusterTimes = {},
): Promise<ClusterController> {
  const skew = new ClockSkew(log);
  const api: Api = openApi({
    ...settings.access,
    userAgent: 'ebbtide-controller',
    onTime: (offset) => skew.told('Kubernetes API', offset),
  });
  const source = clusterSource(api, log, times.watch);
  const { namespace, ttlSeconds } = settings;
  const root = new ClusterRoot({
    api,
    namespace,
    log,
    ttlSeconds,
    times: times.watch,
    // A clock that is ahead would end the time in which both roots are trusted too early.
    clockIsRight: () => Math.abs(skew.worstMs) < HARMFUL_SKEW_MS,
  });
  const distribution = new RootDistribution({
    api,
    log,
    namespaces: () => source.namespaces(),
    bundle: () => root.authority.bundle,
    times: times.watch,
    retryMs: times.retryMs,
  });
  const status = new StatusWriter({ api, log, statusOf: (object) => source.statusOf(object), retryMs: times.retryMs });
  const election = new Election({
    api,
    namespace,
    name: LEASE,
    identity: settings.identity,
    log,
    times: times.lease,
    changed(leading) {
      root.leading = leading;
      distribution.leading = leading;
      status.leading = leading;
    },
  });
  const trust: Trust = {
    authority: () => root.authority,
    onChange: (changed) => root.onChange(changed),
    callers: (places) =>
      new ClusterCallers({ api, trusted: settings.trustedAccounts, pod: (key) => source.pod(key), places }),
  };
  const closeOthers = async (): Promise<void> => {
    await election.close();
    status.close();
    await Promise.all([distribution.close(), root.close()]);
    api.close();
  };
  const abort = (): void => void Promise.all([source.close(), root.close(), distribution.close()]);
  signal?.addEventListener('abort', abort, { once: true });
  try {
    signal?.throwIfAborted();
    await root.start();
    await distribution.start();
    const controller = await startController(settings, {
      source,
      log,
      // The agent says so of each pod, in its annotation.
      belongsInMesh: () => false,
      trust,
      checked(objects, problems) {
        status.update(objects, problems);
        distribution.reconcile();
      },
    });
    root.onChange(() => distribution.reconcile());
    source.onStatusChange(() => status.reconcile());
    election.start();
    return {
      port: controller.port,
      get streams() {
        return controller.streams;
      },
      get leading() {
        return election.leading;
      },
      get authority() {
        return root.authority;
      },
      async close() {
        await closeOthers();
        await controller.close();
      },
    };
  } catch (error) {
    await source.close();
    await closeOthers();
    throw error;
  } finally {
    signal?.removeEventListener('abort', abort);
  }
}
