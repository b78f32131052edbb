import { type DestinationStream, type Logger, pino } from 'pino';

export type { Logger };

/**
 * The process's logger: JSON lines on stdout, written synchronously so that no line is lost at exit.
 * @param part which part of Ebbtide speaks: `agent`, `proxy`, `controller`
 * @param destination takes the lines instead of stdout; whoever gives it sees to it that nothing is lost at exit
 */
export function createLogger(part: string, destination?: DestinationStream): Logger {
  const options = {
    level: process.env['EBBTIDE_LOG'] ?? 'info',
    base: { part },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
  };
  return destination === undefined ? pino(options) : pino(options, destination);
}
