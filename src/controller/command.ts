import { Command } from 'commander';
import type { Logger } from '../mesh/log.js';
import type { RunningController } from './controller.js';
import { addOptions, type ClusterSettings, type ManifestSettings, readSettings } from './settings.js';

/** `ebbtide controller`: runs until SIGTERM or SIGINT; exit code 0 after a clean stop, 1 where it cannot start. */
export function controllerCommand(): Command {
  const command = new Command('controller').description(
    'Serve workloads, services and policies to proxies (delta xDS) and sign their certificates.',
  );
  return addOptions(command).action(async (options) => {
    const { createLogger } = await import('../mesh/log.js');
    const log = createLogger('controller');
    try {
      const settings = readSettings(options);
      const stop = new AbortController();
      const stopped = new Promise<string>((resolve) => {
        for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => resolve(signal));
      });
      const starting =
        'manifests' in settings
          ? startOnManifests(settings, log, stop.signal)
          : startOnCluster(settings, log, stop.signal);
      // A signal while it waits for what it reads makes the start fail, which is then no failure.
      const early = await Promise.race([starting.then(() => undefined), stopped]);
      if (early !== undefined) {
        log.info({ event: 'stopping', signal: early }, 'stopping');
        stop.abort();
        await starting.then(
          (controller) => controller.close(),
          () => {},
        );
        return;
      }
      const controller = await starting;
      log.info({ event: 'stopping', signal: await stopped }, 'stopping');
      await controller.close();
    } catch (error) {
      log.fatal({ event: 'failed', err: error }, `the controller cannot run: ${(error as Error).message}`);
      process.exitCode = 1;
    }
  });
}

async function startOnManifests(
  settings: ManifestSettings,
  log: Logger,
  stop: AbortSignal,
): Promise<RunningController> {
  const { decideEnrolment } = await import('../mesh/enrolment.js');
  const { startController } = await import('./controller.js');
  const { manifestSource } = await import('./manifests.js');
  const source = manifestSource(settings.manifests, settings.data, log);
  stop.addEventListener('abort', () => void source.close());
  return startController(settings, {
    source,
    log,
    data: settings.data,
    belongsInMesh: (pod, namespace) => decideEnrolment(pod, namespace).enrol,
  });
}

async function startOnCluster(settings: ClusterSettings, log: Logger, stop: AbortSignal): Promise<RunningController> {
  const { startClusterController } = await import('./cluster/run.js');
  return startClusterController(settings, log, stop);
}
