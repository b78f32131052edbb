/** Runs the proxy as a process: signals, every way to exit, memory. */
import { setFlagsFromString } from 'node:v8';
import { createLogger } from '../mesh/log.js';
import type { RunningProxy } from './proxy.js';
import { readSettings } from './settings.js';
import { LogStream } from './telemetry/log-stream.js';

export const VERSION = '0.1.0';

const STDOUT = 1;

/**
 * Runs until it is told to stop, then ends the process: 0 after a clean stop, 1 after a failure.
 * @throws Error where the environment cannot be used
 */
export async function runProxy(env: NodeJS.ProcessEnv): Promise<void> {
  // JavaScript here decides little and rarely; what it costs is resident memory, on every node.
  setFlagsFromString('--optimize-for-size');
  // The optimizing compilers' own code is 6 MB of it; an access log line then takes 3.8 us instead of 2.3.
  setFlagsFromString('--no-opt');
  setFlagsFromString('--no-maglev');
  setFlagsFromString('--max-semi-space-size=2');
  const settings = readEnvironment(env);
  const logStream = new LogStream(STDOUT);
  const log = createLogger('proxy', logStream);
  let proxy: RunningProxy | undefined;
  let stopping = false;

  // Native threads must be joined in every way to exit: exiting while they use TLS crashes.
  process.on('exit', () => {
    proxy?.stopNow();
    logStream.flushSync();
  });
  const fail = (error: unknown): void => {
    log.fatal({ event: 'failed', err: error }, 'the proxy ends because of an error that nothing handles');
    process.exit(1);
  };
  process.on('uncaughtException', fail);
  process.on('unhandledRejection', fail);

  const stop = (reason: string): void => {
    if (stopping) {
      log.warn({ event: 'stopping_now', reason }, 'stopping at once');
      process.exit(0);
    }
    stopping = true;
    log.info(
      { event: 'stopping', reason, drainMs: settings.drainMs },
      'stopping: open connections may end by themselves',
    );
    const done = (): void => {
      log.info({ event: 'stopped' }, 'stopped');
      process.exit(0);
    };
    if (proxy === undefined) done();
    else proxy.drain().then(done, fail);
  };
  process.on('SIGTERM', () => stop('SIGTERM'));
  process.on('SIGINT', () => stop('SIGINT'));
  // The reader of the log going away is no reason to end; the stream counts what it could not write.
  process.on('SIGHUP', () => log.info({ event: 'sighup' }, 'SIGHUP is ignored: the proxy has no configuration file'));

  const [{ startProxy }, { createEngine, trafficLabelNames }, { connectSeqpacket }] = await Promise.all([
    import('./proxy.js'),
    import('./native-engine.js'),
    import('../mesh/native-seqpacket.js'),
  ]);
  try {
    proxy = await startProxy({
      settings,
      native: { createEngine, trafficLabelNames: trafficLabelNames(), connectZds: connectSeqpacket },
      log,
      logStream,
      version: VERSION,
      onQuit: () => stop('quitquitquit'),
    });
  } catch (error) {
    log.fatal({ event: 'start_failed', error: (error as Error).message }, 'the proxy cannot start');
    process.exit(1);
  }
  const { nodeName, workers, clusterId, network } = settings;
  log.info(
    { event: 'started', version: VERSION, node: nodeName, workers, clusterId, network, ports: proxy.ports },
    'the proxy runs',
  );
}

function readEnvironment(env: NodeJS.ProcessEnv): ReturnType<typeof readSettings> {
  try {
    return readSettings(env);
  } catch (error) {
    process.stderr.write(`ebbtide proxy: ${(error as Error).message}\n`);
    process.exit(2);
  }
}
