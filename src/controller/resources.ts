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
import { hasSelector, type Membership, MembershipIndex } from './membership.js';
import {
  type AuthorizationPolicy,
  type ClusterObjects,
  keyOf,
  type Namespace,
  namespaceOf,
  type Pod,
  type Problem,
  type Service,
} from './objects.js';
import { buildPeerAuthentications } from './peer-authentications.js';
import { type ConvertedService, convertService, portsForPod, serviceKey } from './services.js';
import { makeResource, type Resource } from './store.js';
import { convertPod } from './workloads.js';
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

/** What a pod's resource was made of; the same again gives the same resource. */
interface Remembered {
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
  readonly #services = new WeakMap<
    Service,
    { inputs: readonly unknown[]; converted: ConvertedService | undefined; resource: Resource | undefined }
  >();
  readonly #policies = new WeakMap<AuthorizationPolicy, Conversion>();
  readonly #authorizations = new WeakMap<object, Resource>();

  constructor(options: BuilderOptions) {
    this.#options = options;
    this.#trustDomain = options.trustDomain === DEFAULT_TRUST_DOMAIN ? '' : options.trustDomain;
  }

  build(objects: ClusterObjects): BuildResult {
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
    this.#addServices(objects.services, namespaces, addresses, problems);

    const services = objects.services.filter(({ spec }) => spec?.type !== 'ExternalName');
    const index = new MembershipIndex(services, this.#addEndpoints(objects, services, nodes, addresses));
    const selecting = groupSelecting(policies.policies);
    for (const pod of objects.pods) {
      const memberships = index.of(pod);
      const keys = policiesOf(pod, selecting);
      const strict = peers.policyOf(pod);
      if (strict !== undefined) keys.push(strict);
      const node = nodes.get(pod.spec?.nodeName ?? '');
      const namespace = namespaces.get(namespaceOf(pod));
      const enrolled =
        pod.metadata.annotations?.[NETNS_ANNOTATION] !== undefined && this.#options.belongsInMesh(pod, namespace);
      const inputs = [node, enrolled, memberships.length, ...memberships.flatMap((m) => [m.service, m.slice]), ...keys];
      const before = this.#pods.get(pod);
      let resource = before?.resource;
      if (before === undefined || !sameInputs(before.inputs, inputs)) {
        const converted = convertPod(pod, {
          clusterId: this.#options.clusterId,
          trustDomain: this.#trustDomain,
          node,
          services: this.#portsOf(pod, memberships),
          policies: keys,
          enrolled,
        });
        resource =
          converted &&
          makeResource(converted.uid, Address.encode({ workload: converted.workload }).finish(), [
            ...converted.aliases,
            ...memberships.flatMap(({ service }) => this.#aliasesOf(service)),
          ]);
        this.#pods.set(pod, { inputs, resource });
      }
      if (resource !== undefined) addresses.set(resource.name, resource);
    }
    return { addresses, authorizations, problems };
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
