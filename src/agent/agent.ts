/** The node agent: manifests in; pods captured by the kernel and told to the proxy out. */
import type { Logger } from '../mesh/log.js';
import { ManifestSource } from '../mesh/manifests.js';
import { releaseBpffs } from './mounts.js';
import { openCapture } from './native-capture.js';
import { kernelNetns, processNetns } from './pod-netns.js';
import { Pods } from './pods.js';
import { misplaced } from './proxy-place.js';
import type { AgentSettings } from './settings.js';
import { serveStatus } from './status.js';
import { ZdsServer } from './zds-server.js';

export interface RunningAgent {
  /** @param keep leave all pods captured; otherwise nothing is left in the kernel */
  close(options: { readonly keep: boolean }): Promise<void>;
}

/** Proxies that do not answer in time are not waited for at the end. */
const GOODBYE_MS = 2000;

/** Starts the agent. Resolves once it has enrolled what it can and listens for proxies. */
export async function startAgent(settings: AgentSettings, log: Logger): Promise<RunningAgent> {
  if (settings.bpffsMounted) {
    log.info({ event: 'bpffs_mounted', path: settings.bpffs }, 'mounted a bpffs, because there was none');
  }
  const capture = openCapture({ cgroup: settings.cgroup, pinDirectory: settings.pinDirectory });
  log.info({ event: 'capture_open', cgroup: settings.cgroup, pins: settings.pinDirectory }, 'programs are attached');
  const places = {
    allowed: settings.proxyNetns,
    own: processNetns('self'),
    podOf: (cookie: bigint) => pods.ofNetns(cookie),
  };
  const zds: ZdsServer = new ZdsServer(settings.zdsSocket, log, {
    workloads: () => pods.workloads(),
    misplaced: (pid) => misplaced(processNetns(pid), places),
    trustProxy: (pid) => capture.trustProxy(pid),
    distrustProxy: (pid) => capture.distrustProxy(pid),
  });
  const pods = new Pods({ nodeName: settings.nodeName, capture, proxies: zds, netns: kernelNetns(), log });
  let objects: Parameters<Pods['apply']>[0] | undefined;
  const apply = (): void => {
    if (objects !== undefined) pods.apply(objects, source.complete);
  };
  const source: ManifestSource = new ManifestSource(settings.manifests, log, {
    onChange: (changed) => {
      objects = changed;
      apply();
    },
    // A file that is mended without a change of objects lets go what was kept for its sake.
    onMended: apply,
  });
  const stopAll = (): void => {
    source.stop();
    pods.stop();
    zds.close();
  };
  try {
    // The socket first: it tells whether another agent is here, before anything is captured.
    zds.listen();
    source.start();
    const status = await serveStatus(settings.statusSocket, () => ({
      node: settings.nodeName,
      proxies: zds.proxies(),
      pods: pods.report(),
      problems: source.problems(),
    }));
    log.info({ event: 'started', node: settings.nodeName }, 'the agent is running');
    return {
      async close({ keep }) {
        source.stop();
        status.close();
        status.closeAllConnections();
        if (!keep) {
          await Promise.race([
            pods.releaseAll().catch((error: unknown) => {
              log.error({ event: 'release_failed', err: error }, 'not all pods were let go one by one');
            }),
            new Promise((resolve) => {
              setTimeout(resolve, GOODBYE_MS).unref();
            }),
          ]);
        }
        stopAll();
        capture.close({ remove: !keep });
        if (!keep) releaseBpffs(settings.bpffs);
        log.info({ event: 'stopped', kept: keep }, keep ? 'stopped; pods stay captured' : 'stopped; nothing is left');
      },
    };
  } catch (error) {
    stopAll();
    // Pods that were captured before this start stay so; otherwise the start leaves no trace.
    capture.close({ remove: capture.adopted().length === 0 });
    throw error;
  }
}
