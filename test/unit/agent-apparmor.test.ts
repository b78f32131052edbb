/** Whether AppArmor confines the agent, as the kernel tells it. The kernel itself: test/vm/apparmor. */
import { describe, expect, it } from 'vitest';
import { apparmorHint, enforcedProfile } from '../../src/agent/apparmor.ts';

const OWN = '/proc/self/attr/apparmor/current';
const SHARED = '/proc/self/attr/current';
const files = (all: Readonly<Record<string, string>>) => (path: string) => all[path];

describe('the enforced profile', () => {
  it('is named where there is one', () => {
    expect(enforcedProfile(files({ [OWN]: 'cri-containerd.apparmor.d (enforce)\n' }))).toBe(
      'cri-containerd.apparmor.d',
    );
    expect(enforcedProfile(files({ [SHARED]: 'docker-default (enforce)\n' }))).toBe('docker-default');
    expect(enforcedProfile(files({ [OWN]: 'own//&:child:unconfined (mixed)\n' }))).toBe('own//&:child:unconfined');
    expect(enforcedProfile(files({ [OWN]: 'a name (with) words (kill)\n' }))).toBe('a name (with) words');
  });

  it('is none where nothing is refused by AppArmor', () => {
    for (const text of ['unconfined\n', 'cri-containerd.apparmor.d (complain)\n', '', '\n'])
      expect(enforcedProfile(files({ [OWN]: text })), text).toBeUndefined();
    // SELinux, and no security module at all.
    expect(enforcedProfile(files({ [SHARED]: 'system_u:system_r:spc_t:s0' }))).toBeUndefined();
    expect(enforcedProfile(files({}))).toBeUndefined();
    // Its own file decides: the shared one is of another module then.
    expect(enforcedProfile(files({ [OWN]: 'unconfined\n', [SHARED]: 'other (enforce)\n' }))).toBeUndefined();
  });
});

describe('the hint', () => {
  const REFUSED = 'making directory /sys/fs/bpf/ebbtide-a: Permission denied';

  it('names profile and remedy for a refusal', () => {
    const hint = apparmorHint(REFUSED, 'cri-containerd.apparmor.d');
    expect(hint).toMatch(/AppArmor.*cri-containerd\.apparmor\.d.*appArmorProfile: \{type: Unconfined\}/);
    expect(apparmorHint("EACCES: permission denied, open '/x'", 'p')).toContain('profile p ');
  });

  it('is silent for another failure, and where nothing is enforced', () => {
    expect(apparmorHint('making directory /sys/fs/bpf/x: No space left on device', 'p')).toBe('');
    expect(apparmorHint(REFUSED, undefined)).toBe('');
  });
});
