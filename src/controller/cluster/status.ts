/** What became of each policy, written into its status: in force, partly, or not, why, and what follows. */
import { type Api, ApiError } from '../../mesh/api/index.js';
import type { Logger } from '../../mesh/log.js';
import { convertAuthorizationPolicy } from '../authorization-policies.js';
import { type AuthorizationPolicy, type ClusterObjects, keyOf, namespaceOf, type Problem } from '../objects.js';

/** Condition that istiod writes for ztunnel; `istioctl analyze` and people look for it. */
const ACCEPTED = 'ZtunnelAccepted';
/** Condition of our own: whether what the policy says is what happens. */
const ENFORCED = 'ebbtide.dev/Enforced';
const OURS: readonly string[] = [ACCEPTED, ENFORCED];

export interface Condition {
  readonly type: string;
  readonly status: 'True' | 'False';
  readonly reason: string;
  readonly message: string;
  readonly lastTransitionTime?: string;
  readonly observedGeneration?: number | string;
}

type Verdict = Omit<Condition, 'lastTransitionTime' | 'observedGeneration'>;

const verdict = (type: string, status: boolean, reason: string, message: string): Verdict => ({
  type,
  status: status ? 'True' : 'False',
  reason,
  message,
});

/** Conditions of an AuthorizationPolicy. */
export function judgeAuthorizationPolicy(object: AuthorizationPolicy): readonly Verdict[] {
  const { policy, problems } = convertAuthorizationPolicy(object);
  const message = problems.join('; ');
  if (policy === undefined && problems.length === 0) {
    const text = 'a policy with targetRefs is for waypoints; node proxies do not look at it';
    return [verdict(ENFORCED, false, 'NotForNodeProxies', text)];
  }
  if (policy === undefined) {
    return [verdict(ACCEPTED, false, 'UnsupportedValue', message), verdict(ENFORCED, false, 'NotEnforced', message)];
  }
  if (problems.length > 0) {
    return [verdict(ACCEPTED, true, 'PartiallyInvalid', message), verdict(ENFORCED, false, 'PartlyEnforced', message)];
  }
  const text = 'node proxies enforce all of it';
  return [verdict(ACCEPTED, true, 'Accepted', text), verdict(ENFORCED, true, 'Enforced', text)];
}

/** Condition of a PeerAuthentication. */
export function judgePeerAuthentication(problems: readonly string[]): readonly Verdict[] {
  if (problems.length === 0) return [verdict(ENFORCED, true, 'Enforced', 'node proxies enforce all of it')];
  const message = problems.join('; ');
  const ignored = problems.some((problem) => /the object is ignored|this one is ignored/.test(problem));
  return [verdict(ENFORCED, false, ignored ? 'NotEnforced' : 'PartlyEnforced', message)];
}

/** The conditions that an object shall have, those of others kept; undefined where it has them already. */
export function mergeConditions(
  existing: readonly Condition[],
  wanted: readonly Verdict[],
  generation: number | undefined,
  now: Date,
): readonly Condition[] | undefined {
  const others = existing.filter(({ type }) => !OURS.includes(type));
  const own = existing.filter(({ type }) => OURS.includes(type));
  const same = (have: Condition | undefined, want: Verdict): boolean =>
    have?.status === want.status &&
    have.reason === want.reason &&
    have.message === want.message &&
    (generation === undefined || Number(have.observedGeneration) === generation);
  const known = (want: Verdict): Condition | undefined => own.find(({ type }) => type === want.type);
  if (own.length === wanted.length && wanted.every((want) => same(known(want), want))) return undefined;
  return [
    ...others,
    ...wanted.map((want): Condition => {
      const before = known(want);
      const since = before?.status === want.status ? before.lastTransitionTime : undefined;
      return {
        ...want,
        lastTransitionTime: since ?? `${now.toISOString().slice(0, 19)}Z`,
        ...(generation === undefined ? {} : { observedGeneration: generation }),
      };
    }),
  ];
}

const PATHS = { AuthorizationPolicy: 'authorizationpolicies', PeerAuthentication: 'peerauthentications' } as const;
type Kind = keyof typeof PATHS;
type Stated = { readonly metadata: AuthorizationPolicy['metadata'] & { readonly generation?: number } };

export interface StatusWriterOptions {
  readonly api: Api;
  readonly log: Logger;
  /** The status that an object of the cluster has now. */
  statusOf(object: object): unknown;
  readonly retryMs?: number | undefined;
}

const RETRY_MS = 10_000;

export class StatusWriter {
  readonly #options: StatusWriterOptions;
  #leading = false;
  #latest: { readonly objects: ClusterObjects; readonly problems: readonly Problem[] } | undefined;
  #running = false;
  #again = false;
  #closed = false;
  #timer: NodeJS.Timeout | undefined;
  /** Kinds whose status cannot be written at all; said once. */
  readonly #told = new Set<string>();

  constructor(options: StatusWriterOptions) {
    this.#options = options;
  }

  set leading(leading: boolean) {
    this.#leading = leading;
    this.reconcile();
  }

  /** Takes what was found out about all objects. */
  update(objects: ClusterObjects, problems: readonly Problem[]): void {
    this.#latest = { objects, problems };
    this.reconcile();
  }

  /** Writes what is not in the objects yet, soon. */
  reconcile(): void {
    if (!this.#leading || this.#closed || this.#latest === undefined) return;
    if (this.#running) {
      this.#again = true;
      return;
    }
    this.#running = true;
    clearTimeout(this.#timer);
    this.#run(this.#latest)
      .then((failed) => {
        if (failed && !this.#closed)
          this.#timer = setTimeout(() => this.reconcile(), this.#options.retryMs ?? RETRY_MS);
      })
      .finally(() => {
        this.#running = false;
        if (this.#again) {
          this.#again = false;
          this.reconcile();
        }
      });
  }

  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }

  /** @returns whether something could not be written */
  async #run({ objects, problems }: { objects: ClusterObjects; problems: readonly Problem[] }): Promise<boolean> {
    const bySource = new Map<object, string[]>();
    for (const { source, message } of problems) {
      if (source !== undefined) bySource.set(source, [...(bySource.get(source) ?? []), message]);
    }
    let failed = false;
    const write = async (kind: Kind, object: Stated, wanted: readonly Verdict[]): Promise<void> => {
      if (!this.#leading || this.#closed) return;
      const status = this.#options.statusOf(object) as { readonly conditions?: readonly Condition[] } | undefined;
      const existing = Array.isArray(status?.conditions) ? status.conditions : [];
      const conditions = mergeConditions(existing, wanted, object.metadata.generation, new Date());
      if (conditions !== undefined && !(await this.#patch(kind, object, conditions))) failed = true;
    };
    for (const object of objects.authorizationPolicies) {
      await write('AuthorizationPolicy', object, judgeAuthorizationPolicy(object));
    }
    for (const object of objects.peerAuthentications) {
      await write('PeerAuthentication', object, judgePeerAuthentication(bySource.get(object) ?? []));
    }
    return failed;
  }

  async #patch(kind: Kind, object: Stated, conditions: readonly Condition[]): Promise<boolean> {
    const { api, log } = this.#options;
    const path = `/apis/security.istio.io/v1/namespaces/${namespaceOf(object)}/${PATHS[kind]}/${object.metadata.name}/status`;
    const reason = conditions.find(({ type }) => type === ENFORCED)?.reason;
    try {
      // The UID makes it fail where the object is another one of the same name by now.
      const metadata = object.metadata.uid === undefined ? {} : { uid: object.metadata.uid };
      await api.request('PATCH', path, { body: { metadata, status: { conditions } } });
      log.info(
        { event: 'status_written', object: `${kind} ${keyOf(object)}`, reason },
        'wrote what became of a policy',
      );
      return true;
    } catch (error) {
      // Gone or replaced meanwhile: the watch tells soon.
      if (error instanceof ApiError && (error.status === 404 || error.status === 409)) return true;
      const what = `${kind}: ${error instanceof ApiError ? error.reason : 'failed'}`;
      if (!this.#told.has(what)) {
        this.#told.add(what);
        log.error({ event: 'status_failed', object: `${kind} ${keyOf(object)}`, err: error }, 'cannot write a status');
      }
      return false;
    }
  }
}
