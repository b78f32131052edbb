import { Command } from 'commander';
import { addOptions } from './options.js';
import { readSettings } from './settings.js';

/** `ebbtide agent`: runs until SIGTERM or SIGINT; exit code 0 after a clean stop, 1 where it cannot start. */
export function agentCommand(): Command {
  const command = new Command('agent').description(
    'Capture the pods of this node that belong in the mesh, and tell the proxy of them (ZDS).',
  );
  return addOptions(command).action(async (options) => {
    const { createLogger } = await import('../mesh/log.js');
    const log = createLogger('agent');
    try {
      const settings = readSettings(options);
      const stopped = new Promise<string>((resolve) => {
        for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => resolve(signal));
      });
      const { Agent } = await import('./agent.js');
      const agent = new Agent(settings, log);
      await agent.start();
      log.info({ event: 'stopping', signal: await stopped }, 'stopping');
      await agent.close();
    } catch (error) {
      const { message } = error as Error;
      const { apparmorHint } = await import('./apparmor.js');
      const why = [message, apparmorHint(message)].filter((each) => each !== '').join('; ');
      log.fatal({ event: 'failed', err: error }, `the agent cannot run: ${why}`);
      process.exitCode = 1;
    }
  });
}
