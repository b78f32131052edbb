/** Codes of `ebbtide check` that must be ok wherever capture can run. */
import type { Code } from '../../src/cli/check/finding.ts';

export const OF_CAPTURE: readonly Code[] = [
  ...(['CAPABILITIES', 'APPARMOR', 'CGROUP_ROOT', 'BPFFS', 'BPF_MAPS', 'BPF_MEMORY', 'SK_STORAGE'] as const),
  ...(['NETNS_COOKIE', 'CAPTURE_PROGRAMS', 'CGROUP_LINKS', 'STEER_PROGRAM', 'SK_LOOKUP_LINK'] as const),
  ...(['GUARD_PROGRAM', 'PORTS', 'PINS'] as const),
];
