import { Command } from 'commander';
import { addOptions, readSettings } from './settings.js';

/** `ebbtide controller`: runs until SIGTERM or SIGINT; exit code 0 after a clean stop, 1 where it cannot start. */
export function controllerCommand(): Command {
  const command = new Command('controller').description(
    'Serve workloads, services and policies to proxies (delta xDS) and sign their certificates.',
  );
  return addOptions(command).action(async (options) => {
    const { createLogger } = await import('../mesh/log.js');
    const { decideEnrolment } = await import('../mesh/enrolment.js');
    const { startController } = await import('./controller.js');
    const { manifestSource } = await import('./manifests.js');
    const log = createLogger('controller');
    try {
      const settings = readSettings(options);
      const source = manifestSource(settings.manifests, settings.data, log);
      const stopped = new Promise<string>((resolve) => {
        for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => resolve(signal));
      });
      const belongsInMesh = (...[pod, namespace]: Parameters<typeof decideEnrolment>): boolean =>
        decideEnrolment(pod, namespace).enrol;
      const starting = startController(settings, { source, log, belongsInMesh });
      // A signal while it waits for its manifests makes the start fail, which is then no failure.
      const early = await Promise.race([starting.then(() => undefined), stopped]);
      if (early !== undefined) {
        log.info({ event: 'stopping', signal: early }, 'stopping');
        await source.close();
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
