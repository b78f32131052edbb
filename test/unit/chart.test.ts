/** What the Helm chart gives to whom: capabilities, tokens, rights, mounts; and that its names and values agree. */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { VARIABLES } from '../../src/proxy/variables.ts';
import {
  CHART,
  container,
  DAEMONSET,
  environment,
  findHelm,
  type KubernetesObject,
  object,
  type PodSpec,
  parseObjects,
  render,
} from './chart-rendered.ts';

const helm = findHelm() ?? '';
if (helm === '') {
  process.stderr.write(
    'chart.test.ts: SKIPPED what needs helm, which is not there; run: bash test/kubernetes/binaries.sh\n',
  );
}
const source = (path: string): string => readFileSync(fileURLToPath(new URL(`../../${path}`, import.meta.url)), 'utf8');

interface Schema {
  readonly type?: string | readonly string[];
  readonly description?: string;
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly additionalProperties?: boolean | Schema;
  readonly items?: Schema;
}

describe('values', () => {
  const schema = JSON.parse(readFileSync(join(CHART, 'values.schema.json'), 'utf8')) as Schema;
  const text = readFileSync(join(CHART, 'values.yaml'), 'utf8');

  it('are all described in the schema, which allows no others', () => {
    const wrong: string[] = [];
    const look = (path: string, value: unknown, at: Schema | undefined): void => {
      if (at === undefined) wrong.push(`${path}: not in the schema`);
      else if (!at.description && path !== '') wrong.push(`${path}: no description`);
      if (at?.properties === undefined) return;
      if (at.additionalProperties !== false) wrong.push(`${path}: allows others`);
      for (const [name, each] of Object.entries((value ?? {}) as Record<string, unknown>)) {
        look(`${path}.${name}`, each, at.properties[name]);
      }
      for (const [name, each] of Object.entries(at.properties)) {
        if (!each.description) wrong.push(`${path}.${name}: no description`);
      }
    };
    look('', parse(text), schema);
    expect(wrong).toEqual([]);
    expect(schema.additionalProperties).toBe(false);
  });

  it('each have a comment', () => {
    const lines = text.split('\n');
    const bare = lines.filter((line, index) => {
      if (!/^ *[A-Za-z]+:/.test(line)) return false;
      // Examples of what Kubernetes defines: quantities, selectors, profiles.
      if (/^ +(cpu|memory|requests|type|kubernetes|grafana_dashboard):/.test(line)) return false;
      return !/^ *#/.test(lines[index - 1] ?? '');
    });
    expect(bare).toEqual([]);
  });
});

it('alerts and dashboards ask for metrics that there are', () => {
  const dashboards = readdirSync(join(CHART, 'dashboards')).map((name) =>
    readFileSync(join(CHART, 'dashboards', name), 'utf8'),
  );
  const queries = [readFileSync(join(CHART, 'alerts.yaml'), 'utf8'), ...dashboards].join('\n');
  const names = new Set(queries.match(/\b(ebbtide|istio|workload_manager|process)_[a-z_]+\b/g));
  const agent = existsSync(fileURLToPath(new URL('../../src/agent/metrics.ts', import.meta.url)));
  const sources = source('src/proxy/telemetry/metrics.ts') + (agent ? source('src/agent/metrics.ts') : '');
  const unknown = [...names].filter((name) => {
    if (name.startsWith('ebbtide_agent_')) {
      // The agent puts its prefix before each name.
      const own = name.replace('ebbtide_agent_', '').replace(/_bucket$/, '');
      return (
        agent &&
        !sources.includes(`'${own}'`) &&
        !sources.includes(`'ebbtide_agent_${own}'`) &&
        !sources.includes(`${own}: [`)
      );
    }
    return !sources.includes(`'${name}'`);
  });
  expect(unknown).toEqual([]);
  expect(names.size).toBeGreaterThan(15);
});

describe.skipIf(helm === '')('the chart', () => {
  let objects: KubernetesObject[] = [];
  let pod = {} as PodSpec;
  beforeAll(() => {
    objects = render(helm);
    pod = object(objects, 'DaemonSet', 'ebbtide-node').spec.template.spec;
  });

  it('passes helm lint', () => {
    execFileSync(helm, ['lint', '--strict', CHART], { stdio: 'pipe' });
  });

  it.each(['k3s', 'microk8s', 'gke', 'openshift'])('renders with the values of %s', (platform) => {
    const rendered = render(helm, ['-f', join(CHART, 'platforms', `${platform}.yaml`)]);
    expect(rendered.map(({ kind }) => kind)).toContain('DaemonSet');
  });

  it('refuses values that are not there, and a mesh without a control plane', () => {
    const refused = (...argv: string[]): string =>
      spawnSync(helm, ['template', CHART, '--kube-version', '1.30.0', ...argv], { encoding: 'utf8' }).stderr;
    expect(refused('--set', 'agent.privileged=true')).toContain('privileged');
    expect(refused('--set', 'proxy.accessLog=some')).toContain('accessLog');
    expect(refused('--set', 'controller.runAsUser=0')).toContain('runAsUser');
    expect(refused('--set', 'controller.enabled=false')).toContain('no control plane');
  });

  it('runs no container privileged, with a writable root or with more capabilities than these', () => {
    const capabilities = new Map<string, unknown>();
    for (const { kind, spec } of objects) {
      if (kind !== 'DaemonSet' && kind !== 'Deployment') continue;
      expect(spec.template.spec.initContainers).toBeUndefined();
      for (const { name, securityContext } of spec.template.spec.containers) {
        expect(securityContext.privileged).toBe(false);
        expect(securityContext.readOnlyRootFilesystem).toBe(true);
        expect(securityContext.capabilities.drop).toEqual(['ALL']);
        capabilities.set(name, securityContext.capabilities.add);
      }
    }
    expect(Object.fromEntries(capabilities)).toEqual({
      agent: ['BPF', 'NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
      proxy: ['NET_ADMIN', 'SYS_ADMIN'],
      controller: undefined,
    });
  });

  it('keeps seccomp for all, and AppArmor for all but the agent', () => {
    const agent = container(objects, 'agent').securityContext;
    const proxy = container(objects, 'proxy').securityContext;
    expect(agent.seccompProfile).toEqual({ type: 'RuntimeDefault' });
    expect(proxy.seccompProfile).toEqual({ type: 'RuntimeDefault' });
    expect(agent.appArmorProfile).toEqual({ type: 'Unconfined' });
    expect(proxy.appArmorProfile).toBeUndefined();
    expect(object(objects, 'Deployment', 'ebbtide-controller').spec.template.spec.securityContext).toEqual({
      runAsNonRoot: true,
      runAsUser: 65532,
      runAsGroup: 65532,
      seccompProfile: { type: 'RuntimeDefault' },
    });
    expect(container(objects, 'controller').securityContext.allowPrivilegeEscalation).toBe(false);
  });

  it('gives a token for the API to the agent alone, and the proxy one that only a certificate authority takes', () => {
    expect(pod.automountServiceAccountToken).toBe(false);
    expect(object(objects, 'ServiceAccount', 'ebbtide-proxy').automountServiceAccountToken).toBe(false);
    const tokens = pod.volumes.flatMap(({ name, projected }) =>
      ((projected as { sources: { serviceAccountToken?: Record<string, unknown> }[] } | undefined)?.sources ?? [])
        .filter(({ serviceAccountToken }) => serviceAccountToken !== undefined)
        .map(({ serviceAccountToken }) => ({ volume: name, ...serviceAccountToken })),
    );
    expect(tokens).toEqual([
      { volume: 'api-token', path: 'token', expirationSeconds: 3607 },
      { volume: 'istio-token', path: 'istio-token', audience: 'istio-ca', expirationSeconds: 43200 },
    ]);
    const mounts = (name: string): string[] => container(objects, name).volumeMounts.map((mount) => mount.name);
    expect(mounts('agent')).toContain('api-token');
    expect(mounts('agent')).not.toContain('istio-token');
    expect(mounts('proxy').sort()).toEqual(['istio-ca-root-cert', 'istio-token', 'proxy-tmp', 'run']);
    expect(pod.volumes.find(({ name }) => name === 'istio-ca-root-cert')?.['configMap']).toEqual({
      name: 'istio-ca-root-cert',
      optional: true,
    });
  });

  it('shows the containers no more of the node than these directories, and the proxy only the socket', () => {
    const paths = pod.volumes.flatMap(({ name, hostPath }) =>
      hostPath === undefined ? [] : [`${name} ${(hostPath as { path: string }).path}`],
    );
    expect(paths).toEqual([
      'bpffs /sys/fs/bpf',
      'cgroup /sys/fs/cgroup',
      'netns /var/run/netns',
      'run /var/run/ztunnel',
    ]);
    const mount = (name: string, volume: string) =>
      container(objects, name).volumeMounts.find((each) => each.name === volume);
    expect(mount('agent', 'cgroup')?.readOnly).toBe(true);
    expect(mount('agent', 'netns')).toMatchObject({ readOnly: true, mountPropagation: 'HostToContainer' });
    expect(mount('proxy', 'run')).toEqual({ name: 'run', mountPath: '/var/run/ztunnel', readOnly: true });
    for (const each of pod.containers) {
      for (const { mountPropagation } of each.volumeMounts) expect(mountPropagation).not.toBe('Bidirectional');
    }
    expect({ hostNetwork: pod.hostNetwork, hostPID: pod.hostPID, hostIPC: pod.hostIPC }).toEqual({
      hostNetwork: false,
      hostPID: true,
      hostIPC: undefined,
    });
  });

  it('lets the agent write to two directories of the node where the boot guard is asked for, and nowhere else', () => {
    const guarded = render(helm, ['--set', 'bootGuard.enabled=true', '--set', 'bootGuard.onFailure=stop']);
    const spec = object(guarded, 'DaemonSet', 'ebbtide-node').spec.template.spec;
    const added = spec.volumes.filter(({ name }) => !pod.volumes.some((each) => each.name === name));
    expect(added.map(({ name, hostPath }) => [name, (hostPath as { path: string }).path])).toEqual([
      ['host-units', '/etc/systemd/system'],
      ['host-exec', '/opt/ebbtide/bin'],
    ]);
    const mounts = (name: string) =>
      container(guarded, name).volumeMounts.filter((each) => each.name.startsWith('host-'));
    expect(mounts('agent').map(({ mountPath }) => mountPath)).toEqual([
      '/host/etc/systemd/system',
      '/host/opt/ebbtide/bin',
    ]);
    expect(mounts('proxy')).toEqual([]);
    const own = Object.fromEntries(environment(container(guarded, 'agent')));
    expect(own).toMatchObject({
      EBBTIDE_BOOT_GUARD: '/host',
      EBBTIDE_BOOT_GUARD_ON_FAILURE: 'stop',
      EBBTIDE_BOOT_GUARD_DAEMONSET: 'ebbtide-system/ebbtide-node',
      EBBTIDE_BOOT_GUARD_BPFFS: '/sys/fs/bpf',
      EBBTIDE_BOOT_GUARD_RUN: '/var/run/ztunnel',
    });
    const help =
      source('src/agent/boot-guard/settings.ts') + source('src/agent/settings.ts') + source('src/agent/options.ts');
    for (const name of Object.keys(own).filter((each) => each.startsWith('EBBTIDE_BOOT_GUARD'))) {
      expect(help).toContain(`'${name}'`);
    }
  });

  it('grants these rights and no others', () => {
    const rights = (kind: string, name: string): string[] =>
      (object(objects, kind, name).rules ?? []).map(
        ({ apiGroups, resources, resourceNames, verbs }) =>
          `${apiGroups.join(',')}/${resources.join(',')}${resourceNames ? `[${resourceNames.join(',')}]` : ''} ${verbs.join(',')}`,
      );
    expect(rights('ClusterRole', 'ebbtide-agent')).toEqual([
      '/pods,namespaces get,list,watch',
      '/nodes get',
      '/pods/status patch',
      '/events create,patch',
    ]);
    expect(rights('Role', 'ebbtide-agent')).toEqual(['apps/daemonsets[ebbtide-node] get']);
    expect(rights('ClusterRole', 'ebbtide-controller')).toEqual([
      '/namespaces,nodes,pods,services get,list,watch',
      'discovery.k8s.io/endpointslices get,list,watch',
      'security.istio.io/authorizationpolicies,peerauthentications get,list,watch',
      'networking.istio.io/serviceentries,workloadentries get,list,watch',
      'security.istio.io/authorizationpolicies/status,peerauthentications/status patch',
      'authentication.k8s.io/tokenreviews create',
      '/configmaps create',
      '/configmaps[istio-ca-root-cert] list,watch,patch',
    ]);
    expect(rights('Role', 'ebbtide-controller')).toEqual([
      '/secrets create',
      '/secrets[istio-ca-secret] list,watch,patch',
      '/secrets[cacerts] list,watch',
      'coordination.k8s.io/leases create',
      'coordination.k8s.io/leases[ebbtide-controller] get,update',
    ]);
    // For the moment of uninstalling only.
    expect(rights('Role', 'ebbtide-uninstall')).toEqual(['apps/daemonsets[ebbtide-node] get,delete']);
    for (const kind of ['ServiceAccount', 'Role', 'RoleBinding', 'Job']) {
      expect(object(objects, kind, 'ebbtide-uninstall').metadata.annotations?.['helm.sh/hook']).toBe('pre-delete');
    }
    const bindings = objects.filter(({ kind }) => kind.endsWith('Binding'));
    expect(
      bindings.map(
        ({ kind, roleRef, subjects }) =>
          `${kind} ${roleRef?.['kind']}/${roleRef?.['name']} ${subjects?.map((each) => `${each['namespace']}/${each['name']}`)}`,
      ),
    ).toEqual([
      'ClusterRoleBinding ClusterRole/ebbtide-agent ebbtide-system/ebbtide-proxy',
      'ClusterRoleBinding ClusterRole/ebbtide-controller ebbtide-system/ebbtide-controller',
      'RoleBinding Role/ebbtide-agent ebbtide-system/ebbtide-proxy',
      'RoleBinding Role/ebbtide-controller ebbtide-system/ebbtide-controller',
      'RoleBinding Role/ebbtide-uninstall ebbtide-system/ebbtide-uninstall',
    ]);
    expect(objects.filter(({ kind }) => kind.endsWith('Role')).length).toBe(5);
    // The name that the agent asks for at its end.
    expect(object(objects, 'DaemonSet', 'ebbtide-node').metadata.namespace).toBe('ebbtide-system');
  });

  it('names the controller in one way: Service, ports, addresses, trusted account', () => {
    const renamed = render(
      helm,
      ['--set', 'controller.service.name=mesh,controller.service.port=15555,node.serviceAccount.name=node-proxy'],
      'elsewhere',
    );
    const proxy = environment(container(renamed, 'proxy'));
    expect(proxy.get('XDS_ADDRESS')).toBe('https://mesh.$(POD_NAMESPACE).svc:15555');
    expect(proxy.get('CA_ADDRESS')).toBe('https://mesh.$(POD_NAMESPACE).svc:15555');
    // The controller's certificate has its usual name.
    expect(proxy.get('ALT_XDS_HOSTNAME')).toBe('ebbtide-controller.$(POD_NAMESPACE).svc');
    expect(environment(container(objects, 'proxy')).get('ALT_XDS_HOSTNAME')).toBeUndefined();
    // $(POD_NAMESPACE) is expanded only after it was defined.
    const names = [...proxy.keys()];
    expect(names.indexOf('POD_NAMESPACE')).toBeLessThan(names.indexOf('XDS_ADDRESS'));
    const service = object(renamed, 'Service', 'mesh').spec;
    const controller = container(renamed, 'controller');
    expect(service.ports).toMatchObject([{ port: 15555, targetPort: 'xds' }]);
    expect(controller.ports).toEqual([{ name: 'xds', containerPort: 15012 }]);
    expect(environment(controller).get('EBBTIDE_LISTEN')).toBe('[::]:15012');
    expect(environment(controller).get('CA_TRUSTED_NODE_ACCOUNTS')).toBe('$(POD_NAMESPACE)/node-proxy');
    const { template } = object(renamed, 'Deployment', 'ebbtide-controller').spec;
    expect(template.metadata.labels).toMatchObject(service.selector);
    for (const { kind, metadata } of renamed) {
      if (!/^Cluster/.test(kind)) expect(metadata.namespace, `${kind} ${metadata.name}`).toBe('elsewhere');
    }
    const istiod = render(helm, [
      '--set',
      'controller.enabled=false,controlPlane.address=istiod.istio-system.svc:15012',
    ]);
    expect(environment(container(istiod, 'proxy')).get('CA_ADDRESS')).toBe('https://istiod.istio-system.svc:15012');
    expect(istiod.filter(({ metadata }) => metadata.name === 'ebbtide-controller')).toEqual([]);
  });

  it('tells the proxy nothing that it does not read, and its grace period is that of the pod', () => {
    const known: readonly string[] = VARIABLES.map(({ name }) => name);
    const proxy = environment(container(objects, 'proxy'));
    expect([...proxy.keys()].filter((name) => !known.includes(name))).toEqual([]);
    expect(proxy.get('TERMINATION_GRACE_PERIOD_SECONDS')).toBe(String(pod.terminationGracePeriodSeconds));
    const paths = (name: string): string[] => container(objects, name).volumeMounts.map(({ mountPath }) => mountPath);
    for (const name of ['XDS_ROOT_CA', 'CA_ROOT_CA', 'AUTH_TOKEN', 'INPOD_UDS']) {
      const file = proxy.get(name) ?? '';
      expect(
        paths('proxy').some((path) => file.startsWith(`${path}/`)),
        `${name} ${file}`,
      ).toBe(true);
    }
    expect(environment(container(objects, 'agent')).get('INPOD_UDS')).toBe(proxy.get('INPOD_UDS'));
    expect(pod.containers.map(({ args }) => args)).toEqual([['agent'], ['proxy']]);
  });

  it('upgrades with a surge, on every node, by readiness alone', () => {
    const { updateStrategy } = object(objects, 'DaemonSet', 'ebbtide-node').spec;
    expect(updateStrategy?.rollingUpdate).toEqual({ maxSurge: 1, maxUnavailable: 0 });
    expect(pod.priorityClassName).toBe('system-node-critical');
    expect(pod.tolerations).toEqual([{ operator: 'Exists' }]);
    for (const each of [...pod.containers, container(objects, 'controller')]) {
      expect(each.readinessProbe, each.name).toBeDefined();
      expect(each.livenessProbe, each.name).toBeUndefined();
    }
    // A port of the node would keep the second generation pending.
    expect(JSON.stringify(pod)).not.toContain('hostPort');
  });

  it('makes a quota for the priority classes everywhere but in kube-system', () => {
    const quota = (rendered: readonly KubernetesObject[]): number =>
      rendered.filter(({ kind }) => kind === 'ResourceQuota').length;
    expect(quota(objects)).toBe(1);
    expect(quota(render(helm, [], 'kube-system'))).toBe(0);
  });

  it('makes monitoring objects only where their kinds are, or where told to', () => {
    const kinds = (...argv: string[]): string[] => render(helm, argv).map(({ kind }) => kind);
    expect(kinds()).not.toContain('PodMonitor');
    expect(kinds()).not.toContain('PrometheusRule');
    const there = kinds(
      '--api-versions',
      'monitoring.coreos.com/v1/PodMonitor',
      '--api-versions',
      'monitoring.coreos.com/v1/PrometheusRule',
    );
    expect(there).toEqual(expect.arrayContaining(['PodMonitor', 'PrometheusRule']));
    const all = render(helm, [
      '--set',
      'monitoring.podMonitor=always,monitoring.prometheusRule=always,monitoring.dashboards.enabled=true,networkPolicy.enabled=true',
    ]);
    const ports = pod.containers.flatMap((each) => each.ports ?? []).map(({ name }) => name);
    for (const { port } of object(all, 'PodMonitor', 'ebbtide-node').spec.podMetricsEndpoints ?? [])
      expect(ports).toContain(port);
    expect(object(all, 'PrometheusRule', 'ebbtide').spec.groups?.[0]?.rules.length).toBeGreaterThan(5);
    const dashboards = object(all, 'ConfigMap', 'ebbtide-dashboards').data ?? {};
    for (const text of Object.values(dashboards)) expect(JSON.parse(text)).toHaveProperty('panels');
    expect(all.filter(({ kind }) => kind === 'NetworkPolicy').length).toBe(2);
  });

  it('lets OpenShift and AppArmor be told what they need', () => {
    const openshift = render(helm, ['-f', join(CHART, 'platforms/openshift.yaml')]);
    expect(object(openshift, 'RoleBinding', 'ebbtide-node-scc').roleRef?.['name']).toBe(
      'system:openshift:scc:privileged',
    );
    expect(container(openshift, 'agent').securityContext.seLinuxOptions).toEqual({ type: 'spc_t' });
    const { securityContext } = object(openshift, 'Deployment', 'ebbtide-controller').spec.template.spec;
    expect(securityContext?.runAsUser).toBeUndefined();
    expect(securityContext?.runAsNonRoot).toBe(true);
  });

  it('is what the kustomize base was generated from', () => {
    const directory = mkdtempSync(join(tmpdir(), 'ebbtide-kustomize-'));
    try {
      execFileSync('bash', [join(DAEMONSET, 'kustomize/generate.sh'), directory], {
        env: { ...process.env, HELM: helm },
      });
      const hint = 'run: bash daemonset/kustomize/generate.sh';
      for (const folder of ['base', 'crds']) {
        for (const name of readdirSync(join(directory, folder))) {
          const read = (root: string): string => readFileSync(join(root, folder, name), 'utf8');
          expect(read(join(DAEMONSET, 'kustomize')), `${folder}/${name}; ${hint}`).toBe(read(directory));
        }
      }
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

it('the kustomization names every custom resource definition of the chart, each with a status', () => {
  const files = readdirSync(join(CHART, 'crds')).sort();
  const kustomization = parse(readFileSync(join(DAEMONSET, 'kustomize/crds/kustomization.yaml'), 'utf8')) as {
    resources: string[];
  };
  expect([...kustomization.resources].sort()).toEqual(files);
  const kinds = files.flatMap((file) => {
    const [definition] = parseObjects(readFileSync(join(CHART, 'crds', file), 'utf8'));
    const spec = definition?.spec as unknown as {
      names: { kind: string };
      versions: { name: string; subresources?: { status?: unknown } }[];
    };
    for (const { name, subresources } of spec.versions) expect(subresources?.status, `${file} ${name}`).toBeDefined();
    return spec.names.kind;
  });
  expect(kinds.sort()).toEqual(['AuthorizationPolicy', 'PeerAuthentication', 'ServiceEntry', 'WorkloadEntry']);
});
