/** Runs all checks of a node, one after the other. What fails to be checked is a finding, too. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { tryFeatures } from '../../agent/capture-check.js';
import { outerProcess } from '../../agent/mounts.js';
import { fallbackOf } from '../../proxy/variables.js';
import type { CheckOptions } from '../check.js';
import { clockFinding, controllerFinding } from './clock.js';
import { clusterFindings } from './cluster.js';
import { featureFindings } from './features.js';
import { type Code, type Finding, inOrder, notTried } from './finding.js';
import {
  apparmorFinding,
  bpffsFinding,
  btfFinding,
  capabilityFinding,
  cgroupFinding,
  descriptorFinding,
  isBpffs,
  kernelFinding,
  settingFindings,
} from './machine.js';
import { type NetnsProcess, networkNamespaces, portRangeFinding } from './namespaces.js';
import { neighbourFindings, surroundingsOf } from './neighbours.js';
import { pinFinding } from './pins.js';
import { portFinding } from './ports.js';
import { cgroupProgramFinding, cgroupPrograms, ingressFinding, skLookupFinding, viewOf } from './programs.js';

/** @throws Error where the addon cannot be loaded */
export async function findAll(options: CheckOptions, env: NodeJS.ProcessEnv = process.env): Promise<Finding[]> {
  const { cgroup: asked, bpffs, hostNetns } = options;
  const cgroup = cgroupFinding(asked);
  const trials = tryFeatures(cgroup.path ?? '', isBpffs(bpffs) ? bpffs : '');
  const pinned = trials.find(({ name }) => name === 'pin:map');
  const findings: Finding[] = [
    kernelFinding(),
    capabilityFinding(),
    apparmorFinding(pinned),
    cgroup.finding,
    bpffsFinding(bpffs, pinned),
    ...featureFindings(trials),
    btfFinding(),
    ...settingFindings(),
    descriptorFinding(),
  ];
  const add = (codes: readonly Code[], look: () => Finding | readonly Finding[]): void => {
    try {
      findings.push(...[look()].flat());
    } catch (error) {
      findings.push(...codes.map((code) => notTried(code, (error as Error).message)));
    }
  };
  let found: ReadonlyMap<bigint, NetnsProcess> | undefined;
  const namespaces = (): ReadonlyMap<bigint, NetnsProcess> => {
    found ??= networkNamespaces();
    return found;
  };
  add(['PORT_RANGE'], () => portRangeFinding(namespaces(), hostNetns ?? nodeNetns()));
  add(['PORTS'], () => portFinding());
  add(['PINS'], () => pinFinding(bpffs));
  add(['CGROUP_PROGRAMS', 'SK_LOOKUP_PROGRAMS', 'INGRESS_PROGRAMS', 'CILIUM', 'ISTIO', 'KMESH'], () => {
    const view = viewOf(bpffs);
    const there = cgroup.path === undefined ? undefined : cgroupPrograms(cgroup.path, view);
    const tcx = trials.some(({ name, errno }) => name === 'guard:tcx' && errno === 0);
    return [
      there === undefined
        ? notTried('CGROUP_PROGRAMS', 'there is no cgroup to look at, see CGROUP_ROOT')
        : cgroupProgramFinding(there),
      skLookupFinding(view, (inode) => namespaces().get(inode)?.text ?? ''),
      ingressFinding(hostNetns ?? nodeNetns(), view, tcx),
      ...neighbourFindings(surroundingsOf(there?.foreign ?? [], nodeRoot())),
    ];
  });
  const controller = await controllerFinding({
    address: env['XDS_ADDRESS'] || undefined,
    rootCa: env['XDS_ROOT_CA'] ?? fallbackOf('XDS_ROOT_CA'),
    altHostname: env['ALT_XDS_HOSTNAME'] ?? '',
  });
  const cluster = await clusterFindings({
    kubeconfig: options.kubeconfig || undefined,
    controllerRoots: controller.roots,
  });
  const told = [...controller.told];
  if (cluster.offset !== undefined) told.push({ of: 'the Kubernetes API', offset: cluster.offset });
  findings.push(controller.finding, clockFinding(told), ...cluster.findings);
  return inOrder(findings);
}

/** In a container with the node's process ids process 1 is in the node's network namespace. */
function nodeNetns(): string {
  return existsSync('/proc/1/ns/net') ? '/proc/1/ns/net' : '/proc/self/ns/net';
}

/** The node's own file system: in a container that of a process outside. */
function nodeRoot(): string {
  const outer = outerProcess();
  return outer === undefined ? '/' : join('/proc', String(outer), 'root');
}
