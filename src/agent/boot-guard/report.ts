/** What became of the boot guard at the last boot, as it reports to the agent. */
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { bootId } from '../machine.js';
import { REPORT_FILE } from './units.js';

export interface BootReport {
  /** `guarded`; `agent`: one was there before; `failed`, `other version`: not guarded; `released`: guarded, and then freed. */
  readonly state: 'guarded' | 'agent' | 'failed' | 'other version' | 'released';
  readonly message: string;
  readonly bootId: string;
  /** When, in seconds after the boot. */
  readonly uptimeSeconds: number;
}

/** @returns undefined where there is no report of this boot */
export function readBootReport(runDirectory: string, boot = bootId()): BootReport | undefined {
  try {
    const report = JSON.parse(readFileSync(join(runDirectory, REPORT_FILE), 'utf8')) as BootReport;
    return report.bootId === boot ? report : undefined;
  } catch {
    return undefined;
  }
}

export function removeBootReport(runDirectory: string): void {
  rmSync(join(runDirectory, REPORT_FILE), { force: true });
}
