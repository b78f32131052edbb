/** What the controller has said so far: versions for reconnecting, bytes for the config dump, and the changes for the engine. */

import { ADDRESS_TYPE, AUTHORIZATION_TYPE, type TypeUrl } from '../../mesh/control-plane.js';
import type { envoy } from '../../mesh/proto/generated.js';
import type { EnginePolicy, EngineService, EngineWorkload, StateDelta } from '../engine.js';
import { type Converted, convertResource } from './decode.js';

type DeltaDiscoveryResponse = envoy.service.discovery.v3.DeltaDiscoveryResponse.$Properties;

interface Held {
  readonly version: string;
  /** The engine's key, which removals must name. */
  readonly key: string;
  /** A copy of the encoded resource: a tenth of the objects' size, and not the collector's business. */
  readonly bytes: Uint8Array;
}

/** A workload of this node, by which certificates and the config dump are told what a pod is. */
export interface LocalWorkload {
  readonly uid: string;
  readonly trustDomain: string;
}

export interface Everything {
  readonly workloads: EngineWorkload[];
  readonly services: EngineService[];
  readonly policies: EnginePolicy[];
}

/** A response, taken apart; `commit` makes it part of the state. */
export interface Change {
  readonly delta: StateDelta;
  /** `name: reason` for each resource that cannot be used. */
  readonly rejected: readonly string[];
  commit(): void;
}

const localKey = (namespace: string, name: string, serviceAccount: string): string =>
  `${namespace}/${name}/${serviceAccount}`;

export class MeshState {
  readonly #nodeName: string;
  readonly #held: Readonly<Record<TypeUrl, Map<string, Held>>> = {
    [ADDRESS_TYPE]: new Map(),
    [AUTHORIZATION_TYPE]: new Map(),
  };
  readonly #local = new Map<string, LocalWorkload>();
  readonly #localKeys = new Map<string, string>();

  /** @param nodeName whose workloads are indexed */
  constructor(nodeName: string) {
    this.#nodeName = nodeName;
  }

  /** Accepted versions by resource name, for `initial_resource_versions`. */
  versions(type: TypeUrl): Record<string, string> {
    return Object.fromEntries([...this.#held[type]].map(([name, { version }]) => [name, version]));
  }

  count(type: TypeUrl): number {
    return this.#held[type].size;
  }

  /** The workload of a pod, by what ZDS says of it. */
  localWorkload(namespace: string, name: string, serviceAccount: string): LocalWorkload | undefined {
    return this.#local.get(localKey(namespace, name, serviceAccount || 'default'));
  }

  /** Converts a response. Resources that are bad are left out and named; nothing changes before `commit`. */
  prepare(type: TypeUrl, response: DeltaDiscoveryResponse): Change {
    const held = this.#held[type];
    const rejected: string[] = [];
    const good: { readonly name: string; readonly converted: Converted; readonly held: Held }[] = [];
    const removed = new Set<string>();
    for (const resource of response.resources ?? []) {
      const name = resource.name ?? '';
      try {
        const any = resource.resource;
        if (any?.type_url !== type) throw new Error(`its type is ${any?.type_url ?? 'missing'}`);
        const converted = convertResource(type, any.value ?? new Uint8Array());
        const { key } = converted;
        const bytes = Uint8Array.from(any.value ?? []);
        good.push({ name, converted, held: { version: resource.version ?? '', key, bytes } });
        const former = held.get(name);
        if (former !== undefined && former.key !== key) removed.add(former.key);
      } catch (error) {
        rejected.push(`${name || '(no name)'}: ${(error as Error).message}`);
      }
    }
    const gone = response.removedResources ?? [];
    for (const name of gone) removed.add(held.get(name)?.key ?? name);
    for (const { converted } of good) removed.delete(converted.key);

    const removals = [...removed];
    const delta: StateDelta = {
      workloads: good.flatMap(({ converted }) => (converted.kind === 'workload' ? [converted.value] : [])),
      services: good.flatMap(({ converted }) => (converted.kind === 'service' ? [converted.value] : [])),
      policies: good.flatMap(({ converted }) => (converted.kind === 'policy' ? [converted.value] : [])),
      removedAddresses: type === ADDRESS_TYPE ? removals : [],
      removedPolicies: type === AUTHORIZATION_TYPE ? removals : [],
    };
    return {
      delta,
      rejected,
      commit: () => {
        for (const name of gone) held.delete(name);
        for (const { name, held: entry } of good) held.set(name, entry);
        this.#indexLocal(delta);
      },
    };
  }

  #indexLocal(delta: StateDelta): void {
    for (const uid of delta.removedAddresses) this.#forgetLocal(uid);
    for (const workload of delta.workloads) {
      this.#forgetLocal(workload.uid);
      if (workload.node !== this.#nodeName) continue;
      const key = localKey(workload.namespace, workload.name, workload.serviceAccount);
      this.#local.set(key, { uid: workload.uid, trustDomain: workload.trustDomain });
      this.#localKeys.set(workload.uid, key);
    }
  }

  #forgetLocal(uid: string): void {
    const key = this.#localKeys.get(uid);
    if (key === undefined) return;
    this.#localKeys.delete(uid);
    if (this.#local.get(key)?.uid === uid) this.#local.delete(key);
  }

  /** Decodes everything that is held: for the config dump, which is rare. */
  everything(): Everything {
    const all: Everything = { workloads: [], services: [], policies: [] };
    for (const type of [ADDRESS_TYPE, AUTHORIZATION_TYPE] satisfies TypeUrl[]) {
      for (const { bytes } of this.#held[type].values()) {
        const converted = convertResource(type, bytes);
        if (converted.kind === 'workload') all.workloads.push(converted.value);
        else if (converted.kind === 'service') all.services.push(converted.value);
        else all.policies.push(converted.value);
      }
    }
    return all;
  }
}
