/** What `ebbtide check` makes of what it sees: features, rights, limits, neighbours. The kernel itself: test/datapath/check. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { Trial } from '../../src/agent/capture-check.ts';
import { listeningInodes } from '../../src/agent/proc.ts';
import { featureFindings } from '../../src/cli/check/features.ts';
import { CODES, type Code, type Finding } from '../../src/cli/check/finding.ts';
import {
  apparmorFinding,
  capabilityFinding,
  cgroupFinding,
  descriptorFinding,
  settingFindings,
} from '../../src/cli/check/machine.ts';
import { neighbourFindings, type Surroundings } from '../../src/cli/check/neighbours.ts';
import { isOurs } from '../../src/cli/check/ports.ts';
import {
  cgroupProgramFinding,
  type Foreign,
  ingressFinding,
  type ProgramView,
  skLookupFinding,
} from '../../src/cli/check/programs.ts';
import { tableOf } from '../../src/cli/check.ts';

const worked = (...names: string[]): Trial[] => names.map((name) => ({ name, errno: 0, message: '', log: '' }));
const ALL = worked(
  'memory:capture',
  'object:capture',
  'map:ebb_sockets',
  'map:ebb_listening',
  'map:ebb_flows',
  'program:capture/ebb_connect4',
  'program:capture/ebb_sockops',
  'program:steer/ebb_steer',
  'program:guard/ebb_guard',
  'program:hold/ebb_mkdir',
  'cgroup:cgroup/connect4',
  'cgroup:sockops',
  'cgroup:cgroup_skb/ingress',
  'tracepoint:cgroup_mkdir',
  'netns:new',
  'netns:cookie',
  'netns:sk_lookup',
  'guard:tcx',
  'guard:classic',
);
const failing = (name: string, errno = 22, log = ''): Trial[] =>
  ALL.map((trial) => (trial.name === name ? { name, errno, message: `trying ${name}: no`, log } : trial));
const of = (findings: readonly Finding[], code: Code): Finding => {
  const found = findings.filter((finding) => finding.code === code);
  expect(found, code).toHaveLength(1);
  return found[0] as Finding;
};

describe('AppArmor', () => {
  const refused: Trial = { name: 'pin:map', errno: 13, message: 'pinning at /b: Permission denied', log: '' };
  const [pinned] = worked('pin:map');

  it('is a warning where a profile is enforced and pinning was not seen to work, with what to do', () => {
    for (const trial of [refused, undefined]) {
      expect(apparmorFinding(trial, 'runtime-default')).toMatchObject({
        code: 'APPARMOR',
        result: 'warning',
        seen: expect.stringContaining('runtime-default'),
        hint: expect.stringContaining('Unconfined'),
      });
    }
    expect(apparmorFinding(refused, 'runtime-default').seen).toContain('pinning at /b');
  });

  it('is ok where no profile is enforced, or one that lets the agent pin', () => {
    expect(apparmorFinding(refused, undefined)).toMatchObject({ result: 'ok', hint: '' });
    expect(apparmorFinding(pinned, 'of-our-own')).toMatchObject({ result: 'ok', hint: '' });
  });
});

describe('features', () => {
  it('are all ok where all was done, each with its code', () => {
    const findings = featureFindings(ALL);
    expect(findings.filter(({ result }) => result !== 'ok')).toEqual([]);
    expect(findings.map(({ code }) => code)).toContain('GUARD_LINK');
    expect(of(findings, 'CGROUP_LINKS').seen).toBe('attached and detached: connect4, sockops');
  });

  it('fail where a required one does, with the verifier’s word, and say who refused', () => {
    const log = 'libbpf: prog x: BPF program load failed\nR1 invalid mem access\nprocessed 12 insns\n';
    const findings = featureFindings(failing('program:capture/ebb_sockops', 13, log));
    expect(of(findings, 'CAPTURE_PROGRAMS')).toMatchObject({
      result: 'failed',
      seen: 'capture/ebb_sockops: trying program:capture/ebb_sockops: no: R1 invalid mem access',
    });
    expect(of(featureFindings(failing('cgroup:sockops', 1)), 'CGROUP_LINKS').hint).toContain('CAPABILITIES');
    expect(of(featureFindings(failing('memory:capture', 12)), 'BPF_MEMORY').hint).toContain('memory');
    expect(of(featureFindings(failing('map:ebb_listening')), 'SK_STORAGE').result).toBe('failed');
    expect(of(featureFindings(failing('map:ebb_listening')), 'BPF_MAPS').result).toBe('ok');
  });

  it('warn where an optional one is missing, and name what serves instead', () => {
    for (const name of ['program:hold/ebb_mkdir', 'tracepoint:cgroup_mkdir', 'cgroup:cgroup_skb/ingress']) {
      const hold = of(featureFindings(failing(name)), 'HOLD');
      expect(hold.result, name).toBe('warning');
      expect(hold.hint).toContain('--hold off');
    }
    expect(of(featureFindings(failing('guard:tcx')), 'GUARD_LINK')).toMatchObject({ result: 'warning' });
    expect(of(featureFindings(failing('guard:tcx')), 'GUARD_LINK').hint).toContain('clsact');
    const neither = failing('guard:tcx').map((trial) =>
      trial.name === 'guard:classic' ? { ...trial, errno: 95, message: 'no clsact' } : trial,
    );
    expect(of(featureFindings(neither), 'GUARD_LINK').result).toBe('failed');
  });

  it('are not shown as ok where they were not tried', () => {
    const noCgroup = featureFindings(ALL.filter(({ name }) => !name.startsWith('cgroup:')));
    for (const code of ['CGROUP_LINKS', 'HOLD'] as const) {
      expect(of(noCgroup, code)).toMatchObject({ result: 'not tried', seen: expect.stringContaining('CGROUP_ROOT') });
    }
    const noNetns = featureFindings([
      ...ALL.filter(({ name }) => !/^(netns|guard):/.test(name)),
      { name: 'netns:new', errno: 1, message: 'making a network namespace: EPERM', log: '' },
    ]);
    for (const code of ['NETNS_COOKIE', 'SK_LOOKUP_LINK', 'GUARD_LINK'] as const) {
      expect(of(noNetns, code)).toMatchObject({ result: 'not tried', seen: expect.stringContaining('EPERM') });
    }
    for (const finding of featureFindings([])) expect(finding.result, finding.code).toBe('not tried');
  });
});

describe('rights and limits', () => {
  const status = (bits: readonly bigint[]): string =>
    `CapEff:\t${bits.reduce((all, bit) => all | (1n << bit), 0n).toString(16)}\n`;
  it('tells capabilities that are needed from those that are of use', () => {
    expect(capabilityFinding(status([12n, 19n, 21n, 38n, 39n])).result).toBe('ok');
    // CAP_SYS_ADMIN is taken for CAP_BPF and CAP_PERFMON.
    expect(capabilityFinding(status([12n, 19n, 21n])).result).toBe('ok');
    expect(capabilityFinding(status([12n, 21n]))).toMatchObject({ result: 'warning' });
    const bare = capabilityFinding(status([39n]));
    expect(bare.result).toBe('failed');
    expect(bare.seen).toMatch(/CAP_NET_ADMIN.*CAP_SYS_ADMIN/);
    expect(bare.seen).not.toContain('CAP_BPF');
    expect(capabilityFinding('').result).toBe('failed');
  });

  it('measures descriptors by connections', () => {
    const limits = (hard: string): string =>
      `Max open files            1024                 ${hard}              files\n`;
    expect(descriptorFinding(limits('1048576'))).toMatchObject({
      result: 'ok',
      seen: expect.stringContaining('471859'),
    });
    expect(descriptorFinding(limits('unlimited')).result).toBe('ok');
    expect(descriptorFinding(limits('4096')).result).toBe('warning');
    expect(descriptorFinding(limits('256')).result).toBe('failed');
    expect(descriptorFinding('').result).toBe('not tried');
  });

  it('warns of settings, and does not guess those it cannot read', () => {
    const settings = (jit?: string, unprivileged?: string): string[] =>
      settingFindings((name) => (name.includes('jit') ? jit : unprivileged)).map(({ result }) => result);
    expect(settings('1', '2')).toEqual(['ok', 'ok']);
    expect(settings('0', '0')).toEqual(['warning', 'warning']);
    expect(settings()).toEqual(['not tried', 'not tried']);
  });

  it('refuses a cgroup path that is none', () => {
    expect(cgroupFinding('/proc').finding).toMatchObject({ code: 'CGROUP_ROOT', result: 'failed' });
    expect(cgroupFinding('/nowhere').path).toBeUndefined();
  });
});

describe('programs of others', () => {
  const one: Foreign = {
    id: 7,
    name: 'cil_sock4_conne',
    hook: 'connect4',
    place: '/sys/fs/cgroup',
    multi: true,
    above: true,
    byLink: true,
    owner: 'of process 9 x',
  };
  const judge = (foreign: readonly Foreign[]): Finding => cgroupProgramFinding({ foreign, all: true });
  it('at cgroup2 fail where they are exclusive, warn where they may rewrite, else are told', () => {
    expect(judge([])).toMatchObject({ result: 'ok', seen: 'none of others' });
    expect(judge([one])).toMatchObject({ result: 'warning' });
    expect(judge([one]).seen).toContain('connect4 cil_sock4_conne (id 7, link, of process 9 x) at /sys/fs/cgroup');
    expect(judge([{ ...one, multi: false, byLink: false }])).toMatchObject({ result: 'failed' });
    expect(judge([{ ...one, multi: false, above: false }]).result).toBe('warning');
    expect(judge([{ ...one, hook: 'skb egress', name: 'sd_fw_egress' }]).result).toBe('ok');
  });

  const view = (names: Readonly<Record<number, string>>, links: ProgramView['links'] = []): ProgramView => ({
    ours: new Set([1]),
    links,
    name: (id) => names[id] ?? '',
    owner: () => 'owner unknown',
  });
  it('at sk_lookup are told by network namespace; our own and dead ones are none', () => {
    const link = { id: 1, kind: 'netns' as const, attachType: 36, program: 5, target: 4_026_531_840n };
    expect(skLookupFinding(view({ 5: 'other' }, [link]), () => ' (process 3 nginx is in it)')).toMatchObject({
      result: 'warning',
      seen: 'other (id 5, owner unknown) in network namespace 4026531840 (process 3 nginx is in it)',
    });
    for (const harmless of [{ program: 1 }, { target: 0n }, { attachType: 17 }]) {
      expect(skLookupFinding(view({ 5: 'other', 1: 'x' }, [{ ...link, ...harmless }]), () => '').result).toBe('ok');
    }
    expect(skLookupFinding(view({ 5: 'ebb_steer' }, [link]), () => '').result).toBe('ok');
  });

  it('at an interface matter only where they run before the guard', () => {
    const filter = { interface: 'veth1', index: 4, how: 'tc' as const, priority: 1, program: 5 };
    const finding = (tcx: boolean, programs: readonly (typeof filter)[]): Finding =>
      ingressFinding('/x', view({ 5: 'cni_policy' }), tcx, () => programs);
    expect(finding(true, [filter]).result).toBe('ok');
    expect(finding(false, [filter])).toMatchObject({
      result: 'warning',
      seen: expect.stringContaining('veth1 tc priority 1'),
    });
    expect(finding(false, [{ ...filter, priority: 49_152 }]).result).toBe('ok');
    const refused = ingressFinding('/x', view({}), true, () => {
      throw new Error('no such namespace');
    });
    expect(refused).toMatchObject({ result: 'not tried', seen: 'no such namespace' });
  });
});

describe('other meshes', () => {
  const nothing: Surroundings = { programs: [], cni: [], processes: [], exists: () => false };
  const results = (surroundings: Partial<Surroundings>): string[] =>
    neighbourFindings({ ...nothing, ...surroundings }).map(({ code, result }) => `${code} ${result}`);
  it('are known by their processes, programs, files and CNI configurations', () => {
    expect(results({})).toEqual(['CILIUM ok', 'ISTIO ok', 'KMESH ok']);
    expect(results({ processes: [{ pid: 3, name: 'ztunnel' }] })).toContain('ISTIO failed');
    expect(results({ cni: [{ name: '10-x.conflist', text: '{"plugins":[{"type": "istio-cni"}]}' }] })).toContain(
      'ISTIO failed',
    );
    expect(results({ exists: (path) => path === '/opt/cni/bin/istio-cni' })).toContain('ISTIO warning');
    expect(results({ exists: (path) => path === '/mnt/kmesh_cgroup2' })).toContain('KMESH warning');
    // Cilium without programs at the sockets is in nobody's way.
    expect(results({ processes: [{ pid: 3, name: 'cilium-agent' }] })).toContain('CILIUM ok');
    const program = {
      id: 1,
      name: 'cil_sock4_conne',
      place: '/',
      hook: '',
      multi: true,
      above: true,
      byLink: true,
      owner: '',
    };
    expect(results({ programs: [program] })).toContain('CILIUM warning');
  });
});

describe('ports', () => {
  it('are looked up among those that listen', () => {
    const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3A98 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 0100007F:3A98 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0
`;
    expect(listeningInodes(table, 15_000)).toEqual(['111']);
    expect(listeningInodes(table, 15_020)).toEqual([]);
  });

  it('are Ebbtide’s own where its processes have them', () => {
    expect(isOurs('/usr/bin/node /opt/ebbtide/dist/main.js proxy')).toBe(true);
    expect(isOurs('node --flag dist/main.js agent --manifests x')).toBe(true);
    expect(isOurs('/usr/bin/ebbtide controller')).toBe(true);
    expect(isOurs('python3 -m http.server 15000 agent')).toBe(false);
  });
});

it('prints a line a finding, and how many of each', () => {
  const table = tableOf([
    { code: 'BTF', result: 'ok', seen: 'there', hint: '' },
    { code: 'PINS', result: 'failed', seen: 'v1', hint: 'uninstall' },
  ]);
  expect(table).toBe(
    'BTF   ok         there\nPINS  failed     v1 -> uninstall\n1 ok, 0 warning, 1 failed, 0 not tried\n',
  );
});

it('has every code in the README, as it is here', () => {
  const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
  const rows = [...readme.matchAll(/^\| `([A-Z_0-9]+)` \| (.*) \| (.*) \|$/gm)].map(([, code, about, worst]) => [
    code,
    about,
    worst,
  ]);
  expect(rows).toEqual(Object.entries(CODES).map(([code, { about, worst }]) => [code, about, worst]));
});
