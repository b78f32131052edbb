/**
 * Whether the agent's DaemonSet goes away with it, as a whole or from this node: only then is everything taken out of the
 * kernel. As Istio's ShouldStopCleanup.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Api, ApiError } from '../mesh/api/index.js';
import type { Metadata } from '../mesh/kubernetes.js';
import { isWantedOn, type NodeChoice } from './node-match.js';

/** The agent's own pod, as the downward API tells. */
export interface OwnPod {
  readonly name: string;
  readonly namespace: string;
  /** As the pod's cgroup has it; undefined where nobody told. */
  readonly uid?: string;
}

/** What the end of the agent means for the pods of its node. */
export interface Ending {
  /** Pods stay captured. */
  readonly keep: boolean;
  /** Why, for the log. */
  readonly reason: string;
}

interface Owned {
  readonly metadata: Metadata;
}

interface DaemonSet extends Owned {
  readonly spec?: { readonly template?: { readonly spec?: NodeChoice } };
}

const TRIES = 3;
const PAUSE_MS = 1000;

export class OwnDaemonSet {
  readonly #api: Api;
  readonly #pod: OwnPod;
  readonly #nodeName: string;
  #name: string | undefined;

  /** @param nodeName the agent's node */
  constructor(api: Api, pod: OwnPod, nodeName: string) {
    this.#api = api;
    this.#pod = pod;
    this.#nodeName = nodeName;
  }

  /** The DaemonSet's name, once it was found. */
  get name(): string | undefined {
    return this.#name;
  }

  /**
   * Finds the DaemonSet by the pod's owner and looks at it, so that a right that this agent lacks is told now and not at its end.
   * @throws ApiError
   */
  async find(): Promise<void> {
    const { name, namespace } = this.#pod;
    const pod = await this.#api.request<Owned>('GET', `/api/v1/namespaces/${namespace}/pods/${name}`);
    const owner = pod.metadata.ownerReferences?.find(
      ({ kind, controller }) => kind === 'DaemonSet' && controller === true,
    );
    if (owner === undefined) throw new Error(`pod ${namespace}/${name} belongs to no DaemonSet`);
    await this.#get(owner.name);
    this.#name = owner.name;
  }

  /** Decides when the agent is told to stop. Takes some seconds at most. */
  async ending(): Promise<Ending> {
    if (this.#name === undefined) return { keep: true, reason: 'its DaemonSet was never found' };
    const what = `DaemonSet ${this.#pod.namespace}/${this.#name}`;
    let last = '';
    for (let tries = 0; tries < TRIES; tries++) {
      if (tries > 0) await sleep(PAUSE_MS);
      try {
        const daemonSet = await this.#get(this.#name);
        if (daemonSet.metadata.deletionTimestamp !== undefined) {
          return { keep: false, reason: `${what} is being deleted` };
        }
        return await this.#onNode(what, daemonSet);
      } catch (error) {
        last = (error as Error).message;
        if (!(error instanceof ApiError)) continue;
        if (error.status === 404) return { keep: false, reason: `${what} is gone` };
        // Rights that are gone tell nothing: an upgrade may move them, and letting all pods go would be in clear.
        if (error.status === 401 || error.status === 403) break;
      }
    }
    return { keep: true, reason: `${what} cannot be asked for: ${last}` };
  }

  /**
   * The DaemonSet stays. Where it does not want this node any more no proxy will be here again, and captured pods would be
   * refused for ever.
   */
  async #onNode(what: string, { spec }: DaemonSet): Promise<Ending> {
    const stays = { keep: true, reason: `${what} stays` };
    const choice = spec?.template?.spec;
    if (choice === undefined) return stays;
    let node: Owned;
    try {
      node = await this.#api.request<Owned>('GET', `/api/v1/nodes/${this.#nodeName}`, { timeoutMs: 3000 });
    } catch (error) {
      return { keep: true, reason: `${what} stays, and its node cannot be asked for: ${(error as Error).message}` };
    }
    if (isWantedOn(choice, node)) return stays;
    return { keep: false, reason: `${what} does not choose node ${this.#nodeName} any more` };
  }

  #get(name: string): Promise<DaemonSet> {
    const path = `/apis/apps/v1/namespaces/${this.#pod.namespace}/daemonsets/${name}`;
    return this.#api.request<DaemonSet>('GET', path, { timeoutMs: 3000 });
  }
}
