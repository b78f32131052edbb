/** From the objects of a cluster to everything that xDS serves. */

import { DEFAULT_TRUST_DOMAIN } from '../mesh/identity.js';
import { NETNS_ANNOTATION } from '../mesh/labels.js';
import { istio } from '../mesh/proto/generated.js';
import {
  buildAuthorizationPolicies,
  type Conversion,
  type ConvertedPolicy,
  convertAuthorizationPolicy,
  policiesOf,
} from './authorization-policies.js';
import { convertEndpoints, podsOfSlice, portsOfSlice, serviceOfSlice } from './endpoint-slices.js';
import { hasSelector, LabelIndex, type Membership, MembershipIndex } from './membership.js';
import {
  type AuthorizationPolicy,
  byAge,
  type ClusterObjects,
  keyOf,
  type Namespace,
  namespaceOf,
  type Pod,
  type Problem,
  type Service,
  type ServiceEntry,
} from './objects.js';
import { buildPeerAuthentications, type PeerAuthenticationResult } from './peer-authentications.js';
import {
  type ConvertedEntry,
  containerPort,
  convertInlineEndpoint,
  convertServiceEntry,
  convertWorkloadEntry,
  labelsOf,
  portsForEntry,
} from './service-entries.js';
import { appProtocolOf, type ConvertedService, convertService, portsForPod, serviceKey } from './services.js';
import { type Delta, makeResource, type Resource } from './store.js';
import { convertPod, podUid } from './workloads.js';
import type { Snapshot } from './xds.js';

const { Address } = istio.workload;
const { Authorization } = istio.security;

export interface BuilderOptions {
  readonly clusterId: string;
  readonly trustDomain: string;
  readonly clusterDomain: string;
  /** Whether a pod belongs in the mesh by its labels and its namespace's. */
  belongsInMesh(pod: Pod, namespace: Namespace | undefined): boolean;
}

export interface BuildResult extends Snapshot {
  readonly problems: readonly Problem[];
}

/** Pods that changed, by `namespace/name`; undefined for those that are no more. */
export type PodChanges = ReadonlyMap<string, Pod | undefined>;

/** Where something changed that pods' resources are made of; pods elsewhere stay what they were. */
export interface Dirty {
  readonly namespaces: ReadonlySet<string>;
  readonly nodes: ReadonlySet<string>;
}

/** Everything but the pods themselves that a pod's resource is made of. */
interface Surroundings {
  readonly index: MembershipIndex;
  readonly entries: LabelIndex<ServiceEntry>;
  readonly selecting: ReadonlyMap<string, readonly ConvertedPolicy[]>;
  readonly peers: PeerAuthenticationResult;
  readonly nodes: ReadonlyMap<string, ClusterObjects['nodes'][number]>;
  readonly namespaces: ReadonlyMap<string, Namespace>;
}

/** What a pod's resource was made of; the same again gives the same resource. */
interface Remembered {
  readonly node: ClusterObjects['nodes'][number] | undefined;
  /** What is not the pod's own: pods of one service share it. */
  readonly inputs: readonly unknown[];
  readonly resource: Resource | undefined;
}

/**
 * Builds all resources from all objects, again and again. An object that is the same one as before, in the same
 * surroundings, is not converted again, so that one change among 50,000 pods costs comparisons only.
 */
export class ResourceBuilder {
  readonly #options: BuilderOptions;
  readonly #trustDomain: string;
  readonly #pods = new WeakMap<Pod, Remembered>();
  readonly #inputs = new WeakMap<Service, readonly unknown[]>();
  readonly #services = new WeakMap<
    Service,
    { inputs: readonly unknown[]; converted: ConvertedService | undefined; resource: Resource | undefined }
  >();
  readonly #policies = new WeakMap<AuthorizationPolicy, Conversion>();
  readonly #authorizations = new WeakMap<object, Resource>();
  readonly #entries = new WeakMap<ServiceEntry, ConvertedEntry>();
  #surroundings: Surroundings | undefined;

  constructor(options: BuilderOptions) {
    this.#options = options;
    this.#trustDomain = options.trustDomain === DEFAULT_TRUST_DOMAIN ? '' : options.trustDomain;
  }

  /**
   * Builds everything.
   * @param dirty where anything but pods changed since the last time; everywhere where that is not known
   */
  build(objects: ClusterObjects, dirty?: Dirty): BuildResult {
    const problems: Problem[] = [];
    const addresses = new Map<string, Resource>();
    const authorizations = new Map<string, Resource>();

    const policies = buildAuthorizationPolicies(objects.authorizationPolicies, (object) => this.#convertPolicy(object));
    const peers = buildPeerAuthentications(objects.peerAuthentications);
    problems.push(...policies.problems, ...peers.problems);
    for (const { key, authorization } of policies.policies) authorizations.set(key, this.#encode(key, authorization));
    for (const [key, authorization] of peers.policies) authorizations.set(key, this.#encode(key, authorization));

    const namespaces = new Map(objects.namespaces.map((namespace) => [namespace.metadata.name, namespace]));
    const nodes = new Map(objects.nodes.map((node) => [node.metadata.name, node]));
    const selecting = groupSelecting(policies.policies);
    const entries = this.#addServiceEntries(objects.serviceEntries ?? [], addresses, problems);
    this.#addServices(objects.services, namespaces, addresses, problems);
    const services = objects.services.filter(({ spec }) => spec?.type !== 'ExternalName');
    const index = new MembershipIndex(services, this.#addEndpoints(objects, services, nodes, addresses));
    const surroundings = { index, entries, selecting, peers, nodes, namespaces };
    this.#addEntryWorkloads(objects, surroundings, addresses, problems);
    this.#surroundings = surroundings;
    for (const pod of objects.pods) {
      const before = dirty === undefined ? undefined : this.#pods.get(pod);
      if (before !== undefined && !isDirty(pod, dirty)) {
        if (before.resource !== undefined) addresses.set(before.resource.name, before.resource);
        continue;
      }
      const resource = this.#podResource(pod, surroundings);
      if (resource !== undefined) addresses.set(resource.name, resource);
    }
    return { addresses, authorizations, problems };
  }

  /**
   * What follows from changes of pods alone, since the last {@link build} and further changes after it; also what is as
   * it was, and removals of what was not there.
   * @throws Error where nothing was built yet
   */
  update(pods: PodChanges): Delta {
    const surroundings = this.#surroundings;
    if (surroundings === undefined) throw new Error('changes of pods before a whole state was built');
    const upserts: Resource[] = [];
    const removals: string[] = [];
    for (const [key, pod] of pods) {
      const resource = pod === undefined ? undefined : this.#podResource(pod, surroundings);
      if (resource === undefined) removals.push(podUid(this.#options.clusterId, key));
      else upserts.push(resource);
    }
    return { upserts, removals };
  }

  #podResource(pod: Pod, { index, entries, selecting, peers, nodes, namespaces }: Surroundings): Resource | undefined {
    const memberships = index.of(pod);
    const chosen = entries.find(namespaceOf(pod), pod.metadata.labels);
    const keys = policiesOf(pod, selecting);
    const strict = peers.policyOf(pod);
    if (strict !== undefined) keys.push(strict);
    const node = nodes.get(pod.spec?.nodeName ?? '');
    const enrolled =
      pod.metadata.annotations?.[NETNS_ANNOTATION] !== undefined &&
      this.#options.belongsInMesh(pod, namespaces.get(namespaceOf(pod)));
    const inputs: unknown[] = [enrolled, memberships.length];
    for (const { service, slice } of memberships) inputs.push(service, slice);
    inputs.push(...keys, ...chosen);
    const before = this.#pods.get(pod);
    if (before !== undefined && before.node === node && sameInputs(before.inputs, inputs)) return before.resource;
    const services = this.#portsOf(pod, memberships);
    for (const entry of chosen) {
      this.#join(entry, services, (name) => containerPort(pod, name));
    }
    const converted = convertPod(pod, {
      clusterId: this.#options.clusterId,
      trustDomain: this.#trustDomain,
      node,
      services,
      policies: keys,
      enrolled,
    });
    const resource =
      converted &&
      makeResource(converted.uid, Address.encode({ workload: converted.workload }).finish(), [
        ...converted.aliases,
        ...memberships.flatMap(({ service }) => this.#aliasesOf(service)),
        ...chosen.flatMap((entry) => this.#entryAliases(entry)),
      ]);
    this.#pods.set(pod, { node, inputs: this.#shared(memberships[0]?.service, inputs), resource });
    return resource;
  }

  /** The inputs of the service's pod before where they are the same, as they mostly are; else a copy that does not grow. */
  #shared(service: Service | undefined, inputs: readonly unknown[]): readonly unknown[] {
    const last = service && this.#inputs.get(service);
    if (last !== undefined && sameInputs(last, inputs)) return last;
    const own = inputs.slice();
    if (service !== undefined) this.#inputs.set(service, own);
    return own;
  }

  #convertPolicy(object: AuthorizationPolicy): Conversion {
    let conversion = this.#policies.get(object);
    if (conversion === undefined) {
      conversion = convertAuthorizationPolicy(object);
      this.#policies.set(object, conversion);
    }
    return conversion;
  }

  #encode(key: string, authorization: istio.security.Authorization.$Properties): Resource {
    let resource = this.#authorizations.get(authorization);
    if (resource === undefined) {
      resource = makeResource(key, Authorization.encode(authorization).finish());
      this.#authorizations.set(authorization, resource);
    }
    return resource;
  }

  #convertEntry(entry: ServiceEntry): ConvertedEntry {
    let converted = this.#entries.get(entry);
    if (converted === undefined) {
      converted = convertServiceEntry(entry);
      this.#entries.set(entry, converted);
    }
    return converted;
  }

  #entryAliases(entry: ServiceEntry): string[] {
    return this.#convertEntry(entry).services.flatMap(({ key, aliases }) => [key, ...aliases]);
  }

  /** Notes the ports under which something serves all hosts of an entry. */
  #join(
    entry: ServiceEntry,
    services: Map<string, istio.workload.Port.$Properties[]>,
    targets: (name: string) => number | undefined,
  ): void {
    const ports = portsForEntry(entry, targets);
    for (const { key } of this.#convertEntry(entry).services) {
      if (!services.has(key)) services.set(key, ports);
    }
  }

  /** Adds the services of ServiceEntries; of two with the same name the older one counts, and a Service before both. */
  #addServiceEntries(
    entries: readonly ServiceEntry[],
    addresses: Map<string, Resource>,
    problems: Problem[],
  ): LabelIndex<ServiceEntry> {
    const selecting = new LabelIndex<ServiceEntry>();
    for (const entry of [...entries].sort(byAge)) {
      const object = `ServiceEntry ${keyOf(entry)}`;
      const converted = this.#convertEntry(entry);
      for (const message of converted.problems) problems.push({ object, message, source: entry });
      for (const { key, service, aliases } of converted.services) {
        if (addresses.has(key)) {
          problems.push({
            object,
            message: `an older one has host ${key} already; this one's is left out`,
            source: entry,
          });
        } else addresses.set(key, makeResource(key, Address.encode({ service }).finish(), aliases));
      }
      const selector = entry.spec?.workloadSelector?.labels;
      if (selector !== undefined && entry.spec?.resolution !== 'NONE')
        selecting.add(namespaceOf(entry), selector, entry);
    }
    return selecting;
  }

  /** Adds WorkloadEntries and the endpoints that stand in ServiceEntries. */
  #addEntryWorkloads(
    objects: ClusterObjects,
    { index, entries, selecting, peers }: Surroundings,
    addresses: Map<string, Resource>,
    problems: Problem[],
  ): void {
    const { clusterId } = this.#options;
    const policies = (namespace: string, labels: Readonly<Record<string, string>>): string[] => {
      const object = { metadata: { namespace, labels, name: '', uid: '' } };
      const keys = policiesOf(object, selecting);
      const strict = peers.policyOf(object);
      return strict === undefined ? keys : [...keys, strict];
    };
    const put = (uid: string, workload: istio.workload.Workload.$Properties, aliases: readonly string[]): void =>
      void addresses.set(uid, makeResource(uid, Address.encode({ workload }).finish(), aliases));
    for (const entry of objects.serviceEntries ?? []) {
      if (entry.spec?.resolution === 'NONE' || entry.spec?.workloadSelector !== undefined) continue;
      for (const endpoint of entry.spec?.endpoints ?? []) {
        const services = new Map<string, istio.workload.Port.$Properties[]>();
        this.#join(entry, services, (name) => endpoint.ports?.[name]);
        const converted = convertInlineEndpoint(entry, endpoint, {
          clusterId,
          trustDomain: this.#trustDomain,
          services,
          policies: policies(namespaceOf(entry), endpoint.labels ?? {}),
        });
        if (converted) put(converted.uid, converted.workload, [...converted.aliases, ...this.#entryAliases(entry)]);
      }
    }
    for (const entry of objects.workloadEntries ?? []) {
      const labels = labelsOf(entry);
      const namespace = namespaceOf(entry);
      const services = new Map<string, istio.workload.Port.$Properties[]>();
      const aliases: string[] = [];
      for (const service of index.selecting(namespace, labels)) {
        const target = (name: string | undefined, fallback: number | string | undefined, port: number): number =>
          entry.spec?.ports?.[name ?? ''] ?? (typeof fallback === 'number' ? fallback : port);
        const ports = (service.spec?.ports ?? []).map(({ name, port, targetPort, appProtocol }) => ({
          servicePort: port,
          targetPort: target(name, targetPort, port),
          appProtocol: appProtocolOf({
            ...(name === undefined ? {} : { name }),
            ...(appProtocol === undefined ? {} : { appProtocol }),
          }),
        }));
        services.set(serviceKey(service, this.#options.clusterDomain), ports);
        aliases.push(...this.#aliasesOf(service));
      }
      for (const chosen of entries.find(namespace, labels)) {
        this.#join(chosen, services, (name) => entry.spec?.ports?.[name]);
        aliases.push(...this.#entryAliases(chosen));
      }
      const converted = convertWorkloadEntry(entry, {
        clusterId,
        trustDomain: this.#trustDomain,
        services,
        policies: policies(namespace, labels),
      });
      if (converted) put(converted.uid, converted.workload, [...converted.aliases, ...aliases]);
      else {
        const message = `address ${JSON.stringify(entry.spec?.address ?? '')} is no IP address, which is not supported; it is left out`;
        problems.push({ object: `WorkloadEntry ${keyOf(entry)}`, message, source: entry });
      }
    }
  }

  #addServices(
    services: readonly Service[],
    namespaces: ReadonlyMap<string, Namespace>,
    addresses: Map<string, Resource>,
    problems: Problem[],
  ): void {
    for (const service of services) {
      const namespaceAnnotations = namespaces.get(namespaceOf(service))?.metadata.annotations;
      let entry = this.#services.get(service);
      if (entry === undefined || entry.inputs[0] !== namespaceAnnotations) {
        const { clusterDomain } = this.#options;
        const converted = convertService(service, { clusterDomain, namespaceAnnotations });
        const resource =
          converted &&
          makeResource(converted.key, Address.encode({ service: converted.service }).finish(), converted.aliases);
        entry = { inputs: [namespaceAnnotations], converted, resource };
        this.#services.set(service, entry);
      }
      if (entry.resource !== undefined) addresses.set(entry.resource.name, entry.resource);
      for (const message of entry.converted?.problems ?? []) {
        problems.push({ object: `Service ${keyOf(service)}`, message, source: service });
      }
    }
  }

  /** Adds the endpoints that are no pods. @returns the Services that slices name pods for, by pod */
  #addEndpoints(
    objects: ClusterObjects,
    services: readonly Service[],
    nodes: ReadonlyMap<string, ClusterObjects['nodes'][number]>,
    addresses: Map<string, Resource>,
  ): Map<string, Membership[]> {
    const byPod = new Map<string, Membership[]>();
    if (objects.endpointSlices.length === 0) return byPod;
    const selectorless = new Map<string, Service>();
    for (const service of services) if (!hasSelector(service)) selectorless.set(keyOf(service), service);
    for (const slice of objects.endpointSlices) {
      const service = selectorless.get(serviceOfSlice(slice) ?? '');
      if (service === undefined) continue;
      for (const pod of podsOfSlice(slice)) {
        const list = byPod.get(pod) ?? [];
        byPod.set(pod, list);
        list.push({ service, slice });
      }
      const { clusterId, clusterDomain } = this.#options;
      const context = {
        clusterId,
        trustDomain: this.#trustDomain,
        serviceKey: serviceKey(service, clusterDomain),
        nodes,
      };
      for (const { uid, workload, aliases } of convertEndpoints(slice, service, context)) {
        const value = Address.encode({ workload }).finish();
        addresses.set(uid, makeResource(uid, value, [...aliases, ...this.#aliasesOf(service)]));
      }
    }
    return byPod;
  }

  #portsOf(pod: Pod, memberships: readonly Membership[]): Map<string, istio.workload.Port.$Properties[]> {
    const ports = new Map<string, istio.workload.Port.$Properties[]>();
    for (const { service, slice } of memberships) {
      const key = serviceKey(service, this.#options.clusterDomain);
      const own = slice === undefined ? portsForPod(service, pod) : portsOfSlice(slice, service);
      ports.set(key, [...(ports.get(key) ?? []), ...own]);
    }
    return ports;
  }

  /** Keys by which an on-demand client asks for a Service, and by that for its workloads. */
  #aliasesOf(service: Service): string[] {
    const converted = this.#services.get(service)?.converted;
    return converted === undefined ? [] : [converted.key, ...converted.aliases];
  }
}

function isDirty(pod: Pod, dirty: Dirty | undefined): boolean {
  return dirty === undefined || dirty.namespaces.has(namespaceOf(pod)) || dirty.nodes.has(pod.spec?.nodeName ?? '');
}

function groupSelecting(policies: readonly ConvertedPolicy[]): Map<string, ConvertedPolicy[]> {
  const groups = new Map<string, ConvertedPolicy[]>();
  for (const policy of policies) {
    if (policy.labels === undefined) continue;
    const group = groups.get(policy.namespace) ?? [];
    groups.set(policy.namespace, group);
    group.push(policy);
  }
  return groups;
}

function sameInputs(left: readonly unknown[], right: readonly unknown[]): boolean {
  return left.length === right.length && left.every((input, index) => input === right[index]);
}
