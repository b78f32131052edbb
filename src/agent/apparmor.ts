/** AppArmor, which container runtimes confine containers by where the node's kernel has it: whether it confines this process. */
import { readFileSync } from 'node:fs';

/** With a directory for each security module since Linux 5.8; before, the file is of whichever module has it. */
const FILES = ['/proc/self/attr/apparmor/current', '/proc/self/attr/current'] as const;

function readOwn(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
}

/**
 * The AppArmor profile that is enforced on this process.
 * @param read gives the text of a file, undefined where it cannot be read: without AppArmor there is none, or it is no use
 * @returns the profile's name; undefined where nothing is enforced
 */
export function enforcedProfile(read: (path: string) => string | undefined = readOwn): string | undefined {
  const text = FILES.map(read).find((each) => each !== undefined);
  // "NAME (MODE)" or "unconfined"; SELinux has a context without a mode. In mode complain nothing is refused.
  return /^(.+) \((?:enforce|mixed|kill|prompt)\)\n?$/.exec(text ?? '')?.[1];
}

/** Why AppArmor may be what refused, and what to do; "" where it is not, or what failed was no refusal. */
export function apparmorHint(message: string, profile = enforcedProfile()): string {
  return profile !== undefined && /permission denied/i.test(message) ? profileHint(profile) : '';
}

/** What a profile that is enforced is likely to refuse, and what to do. */
export function profileHint(profile: string): string {
  return (
    `AppArmor enforces profile ${profile} on this process, which is likely what refuses: container runtimes' default profile ` +
    'denies pinning below /sys/fs/bpf and looking into the processes of pods; run the agent unconfined ' +
    '(appArmorProfile: {type: Unconfined}, as the chart does), or under a profile of your own that allows both'
  );
}
