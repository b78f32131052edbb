import { type Logger, pino } from 'pino';

export type { Logger };

/**
 * The process's logger: JSON lines on stdout, written synchronously so that no line is lost at exit.
 * @param part which part of Ebbtide speaks: `agent`, `proxy`, `controller`
 */
export function createLogger(part: string): Logger {
  const level = process.env['EBBTIDE_LOG'] ?? 'info';
  return pino({
    level,
    base: { part },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label) => ({ level: label }) },
  });
}
