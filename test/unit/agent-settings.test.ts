import { describe, expect, it } from 'vitest';
import { checkCapabilities, checkCgroup, findCgroupRoot, isOnBpffs, podsCgroup } from '../../src/agent/machine.ts';
import { outerProcess, provideBpffs } from '../../src/agent/mounts.ts';
import { clusterSettings, pinDirectoryOf, readSettings } from '../../src/agent/settings.ts';

const line = (root: string, point: string, type = 'cgroup2') =>
  `41 31 0:38 ${root} ${point} rw,relatime shared:1 - ${type} none rw`;

describe('the root of cgroup2', () => {
  it('is found among other mounts, with escapes undone', () => {
    const info = [line('/', '/a', 'cgroup'), line('/part', '/b'), line('/', '/my\\040cgroup'), ''].join('\n');
    expect(findCgroupRoot(info, () => true)).toBe('/my cgroup');
  });
  it('is not a part of it, nor what a cgroup namespace shows for one', () => {
    expect(() => findCgroupRoot(line('/part', '/b'), () => true)).toThrow(/\/b is not the root.*--cgroup/);
    expect(() => findCgroupRoot(line('/', '/b'), () => false)).toThrow(/\/b is not the root/);
  });
  it('is missed with a hint', () => {
    expect(() => findCgroupRoot(line('/', '/a', 'cgroup'), () => true)).toThrow(/mount -t cgroup2/);
  });
});

describe('the machine', () => {
  it('is refused when it is not what is needed', () => {
    expect(() => checkCgroup('/proc')).toThrow(/no directory of cgroup2/);
    expect(() => checkCgroup('/nowhere')).toThrow(/ENOENT/);
    expect(isOnBpffs('/proc/x/y')).toBe(false);
    expect(() => provideBpffs('/proc/x/y', () => undefined)).toThrow(/mount -t bpf.*--bpffs/);
  });
  it('has no outer process where nothing hides its mounts', () => {
    expect(outerProcess()).toBeUndefined();
  });
  it('must give the capabilities, of which each that lacks is named', () => {
    expect(() => checkCapabilities('CapEff:\t0000000000000000')).toThrow(/CAP_NET_ADMIN.*CAP_SYS_ADMIN.*CAP_BPF/);
    expect(() => checkCapabilities('CapEff:\t0000000000201000')).not.toThrow();
    expect(() => checkCapabilities('CapEff:\t0000008000001000')).toThrow(/lacks CAP_SYS_ADMIN \(.*\);/);
  });
});

describe('the cgroup of the node’s pods', () => {
  const uid = '0b2c4d6e-1111-4222-8333-a0b1c2d3e4f5';
  it.each([
    [`4:cpu:/x\n0::/kubepods/besteffort/pod${uid}/id\n`, '/kubepods'],
    [`0::/lab/node1/kubepods/pod${uid}/id\n`, '/lab/node1/kubepods'],
    [`0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod${uid}.slice/id.scope\n`, '/kubepods.slice'],
    [
      `0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod${uid}.slice/id.scope\n`,
      '/kubelet.slice/kubelet-kubepods.slice',
    ],
    ['0::/\n', undefined],
    [`0::/../../pod${uid}/id\n`, undefined],
    [`0::/../kubepods/pod${uid}/id\n`, undefined],
    ['0::/system.slice/ebbtide.service\n', undefined],
    [`4:cpu:/kubepods/pod${uid}/id\n`, undefined],
  ])('by %j is %s', (cgroup, expected) => expect(podsCgroup(cgroup)).toBe(expected));
});

describe('settings', () => {
  const raw = {
    manifests: 'm',
    guard: 'auto',
    bpffs: '/sys/fs/bpf',
    hostProc: '/proc',
    cniNetns: '/var/run/netns',
    kubeletPort: '10250',
    proxyNetns: 'own',
    bootGuardOnFailure: 'continue',
    bootGuardReleaseAfter: '600',
    bootGuardExec: '/opt/ebbtide/bin',
  } as const;
  it.each([[undefined], [''], ['../x'], ['UPPER']])('refuse NODE_NAME %s', (name) => {
    expect(() => readSettings(raw, name === undefined ? {} : { NODE_NAME: name })).toThrow(/NODE_NAME.*spec.nodeName/);
  });
  const cluster = { ...raw, manifests: '' };
  const inPod = { KUBERNETES_SERVICE_HOST: '10.0.0.1' };
  it('are for a folder of manifests: no port, everything removed at the end, no other agent asked', () => {
    expect(clusterSettings(raw, inPod)).toMatchObject({
      port: undefined,
      keep: false,
      takeOver: false,
      hold: undefined,
    });
  });
  it('are for the Kubernetes API in a pod: a port, pods kept unless the DaemonSet is deleted, the node taken over', () => {
    const env = { ...inPod, POD_NAME: 'a', POD_NAMESPACE: 'mesh', POD_UID: 'u' };
    expect(clusterSettings(cluster, env)).toMatchObject({
      manifests: undefined,
      port: 15014,
      keep: undefined,
      takeOver: true,
      ownPod: { name: 'a', namespace: 'mesh', uid: 'u' },
      excludedNamespaces: ['kube-system'],
      readyPatienceMs: 30_000,
      hold: { undecided: 'refuse' },
    });
    const more = { ...env, EXCLUDE_NAMESPACES: ' a, ,b', EBBTIDE_KEEP_ON_EXIT: 'false' };
    expect(clusterSettings({ ...cluster, port: '0', takeOver: false }, more)).toMatchObject({
      excludedNamespaces: ['a', 'b'],
      keep: false,
      port: 0,
      takeOver: false,
    });
    expect(clusterSettings({ ...cluster, keep: true, port: 'none' }, more)).toMatchObject({
      keep: true,
      port: undefined,
    });
  });
  it.each([
    ['no source at all', cluster, {}, /--manifests DIR, or --kubeconfig FILE/],
    ['two sources', { ...raw, kubeconfig: 'k' }, inPod, /exclude each other/],
    ['a port that is none', { ...cluster, port: '70000' }, inPod, /--port is "70000"/],
    ['a patience that is none', cluster, { ...inPod, EBBTIDE_READY_PATIENCE_SECONDS: '-1' }, /whole number of seconds/],
  ])('refuse %s', (_, options, env, message) => expect(() => clusterSettings(options, env)).toThrow(message));
  it('name the pins so that agents of several nodes do not meet, without dots', () => {
    expect(pinDirectoryOf('/b', 'a.b')).toBe('/b/ebbtide-a_b');
    expect(pinDirectoryOf('/b', 'a-b')).toBe('/b/ebbtide-a-b');
  });
});
