/** Who calls, in a cluster: proxies that show the token of their own pod (TokenReview, audience `istio-ca`). */
import { createHash } from 'node:crypto';
import type { Api } from '../../mesh/api/index.js';
import { type Caller, type Callers, Refusal, Unavailable } from '../callers.js';
import { namespaceOf, type Pod, serviceAccountOf } from '../objects.js';
import type { Places } from '../places.js';

const AUDIENCE = 'istio-ca';
/** What the API said of a token is believed for so long; a pod that is gone is noticed at once all the same. */
const ACCEPTED_MS = 30_000;
const REFUSED_MS = 5000;
const MAX_REMEMBERED = 10_000;
const REVIEW_TIMEOUT_MS = 10_000;
const USERNAME = /^system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})$/;

interface TokenReview {
  readonly status?: {
    readonly authenticated?: boolean;
    readonly error?: string;
    readonly audiences?: readonly string[];
    readonly user?: {
      readonly username?: string;
      readonly groups?: readonly string[];
      readonly extra?: Readonly<Record<string, readonly string[]>>;
    };
  };
}

/** What a token proves. */
interface Proven {
  readonly namespace: string;
  readonly serviceAccount: string;
  readonly podName: string | undefined;
  readonly podUid: string | undefined;
}

export interface ClusterCallersOptions {
  readonly api: Api;
  /** `namespace/name` of the service accounts of node proxies. */
  readonly trusted: ReadonlySet<string>;
  /** A pod that has not ended. */
  pod(key: string): Pod | undefined;
  readonly places: Places;
  readonly now?: () => number;
}

export class ClusterCallers implements Callers {
  readonly #options: ClusterCallersOptions;
  readonly #now: () => number;
  /** By hash, so that no token is kept. */
  readonly #reviews = new Map<string, { readonly until: number; readonly result: Promise<Proven | string> }>();

  constructor(options: ClusterCallersOptions) {
    this.#options = options;
    this.#now = options.now ?? (() => performance.now());
  }

  async authenticate(token: string): Promise<Caller> {
    const proven = await this.#review(token);
    if (typeof proven === 'string') throw new Refusal(proven);
    const { namespace, serviceAccount, podName, podUid } = proven;
    const account = `${namespace}/${serviceAccount}`;
    if (!this.#options.trusted.has(account)) {
      throw new Refusal(`service account ${account} is not one of node proxies (--trusted-accounts)`);
    }
    if (podName === undefined || podUid === undefined)
      throw new Refusal(`the token of ${account} is not bound to a pod`);
    const key = `${namespace}/${podName}`;
    const pod = this.#options.pod(key);
    if (pod === undefined) throw new Refusal(`there is no running pod ${key}, of which the token is`);
    if (pod.metadata.uid !== podUid) throw new Refusal(`pod ${key} is another one than that of which the token is`);
    if (serviceAccountOf(pod) !== serviceAccount || namespaceOf(pod) !== namespace) {
      throw new Refusal(`pod ${key} does not have service account ${account}`);
    }
    const node = pod.spec?.nodeName;
    if (node === undefined || node === '') throw new Refusal(`pod ${key} is on no node`);
    return { node, pod: { key, uid: podUid } };
  }

  remains({ node, pod }: Caller): boolean {
    if (pod === undefined) return false;
    const now = this.#options.pod(pod.key);
    return now?.metadata.uid === pod.uid && now.spec?.nodeName === node;
  }

  runsOn(node: string, namespace: string, serviceAccount: string): boolean {
    return this.#options.places.has(node, namespace, serviceAccount);
  }

  #review(token: string): Promise<Proven | string> {
    const hash = createHash('sha256').update(token).digest('base64');
    const now = this.#now();
    const known = this.#reviews.get(hash);
    if (known !== undefined && known.until > now) return known.result;
    const result = this.#ask(token);
    this.#remember(hash, now + ACCEPTED_MS, result);
    result.then(
      (proven) => {
        if (typeof proven === 'string') this.#remember(hash, this.#now() + REFUSED_MS, result);
      },
      () => this.#reviews.delete(hash),
    );
    return result;
  }

  #remember(hash: string, until: number, result: Promise<Proven | string>): void {
    this.#reviews.delete(hash);
    this.#reviews.set(hash, { until, result });
    // The oldest goes: whoever sends many wrong tokens makes nobody's memory but ours a bounded bit larger.
    for (const oldest of this.#reviews.keys()) {
      if (this.#reviews.size <= MAX_REMEMBERED) break;
      this.#reviews.delete(oldest);
    }
  }

  /** @returns what the token proves, or why it proves nothing */
  async #ask(token: string): Promise<Proven | string> {
    let review: TokenReview;
    try {
      review = await this.#options.api.request<TokenReview>('POST', '/apis/authentication.k8s.io/v1/tokenreviews', {
        body: { apiVersion: 'authentication.k8s.io/v1', kind: 'TokenReview', spec: { token, audiences: [AUDIENCE] } },
        timeoutMs: REVIEW_TIMEOUT_MS,
      });
    } catch (error) {
      throw new Unavailable(`cannot have a token reviewed: ${(error as Error).message}`);
    }
    const { authenticated, error, audiences, user } = review.status ?? {};
    if (authenticated !== true) {
      const time = /expired|not valid yet|not yet valid|before/i.test(error ?? '')
        ? ' (the kubelet renews tokens: clock skew of that node or of the API server?)'
        : '';
      return `the API does not know the token${error ? `: ${error.slice(0, 200)}${time}` : ''}`;
    }
    // An API server that knows nothing of audiences would accept any token; it does not name ours then.
    if (audiences?.includes(AUDIENCE) !== true) return `the token is not of audience ${AUDIENCE}`;
    const match = USERNAME.exec(user?.username ?? '');
    if (match === null || user?.groups?.includes('system:serviceaccounts') !== true) {
      return `the token is of ${JSON.stringify(user?.username)}, no service account`;
    }
    return {
      namespace: match[1] ?? '',
      serviceAccount: match[2] ?? '',
      podName: user.extra?.['authentication.kubernetes.io/pod-name']?.[0],
      podUid: user.extra?.['authentication.kubernetes.io/pod-uid']?.[0],
    };
  }
}
