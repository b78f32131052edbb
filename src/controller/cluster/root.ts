/** The root of trust of a cluster: a Secret that all replicas share, made by whoever is first, followed when it changes. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Api, ApiError, type ApiObject, Watched, type WatchedOptions } from '../../mesh/api/index.js';
import { Backoff } from '../../mesh/backoff.js';
import type { Logger } from '../../mesh/log.js';
import { type Authority, createAuthority } from '../authority.js';
import {
  fingerprints,
  makeRoot,
  PLUGGED_SECRET,
  readRootSecret,
  SELF_SIGNED_SECRET,
  SELF_SIGNED_TYPE,
  type SecretTexts,
  selfSignedData,
} from './root-secret.js';
import { nextStep } from './rotation.js';

export interface ClusterRootOptions {
  readonly api: Api;
  /** The controller's own. */
  readonly namespace: string;
  readonly log: Logger;
  /** Longest lifetime of workload certificates, which tells how long a rotation takes. */
  readonly ttlSeconds: number;
  readonly times?: WatchedOptions<unknown>['times'];
  readonly now?: () => Date;
  /** Whether the time is known to be right enough for a step of a rotation, which waits else. */
  readonly clockIsRight?: () => boolean;
}

/** How often it is looked whether a step of a rotation is due. */
const ROTATION_CHECK_MS = 60_000;

export class ClusterRoot {
  readonly #options: ClusterRootOptions;
  readonly #log: Logger;
  readonly #now: () => Date;
  readonly #path: string;
  readonly #secrets: readonly Watched<SecretTexts>[];
  readonly #listeners = new Set<() => void>();
  readonly #stop = new AbortController();
  #authority: Authority | undefined;
  #texts: SecretTexts | undefined;
  #loading: Promise<void> = Promise.resolve();
  #leading = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: ClusterRootOptions) {
    this.#options = options;
    this.#log = options.log;
    this.#now = options.now ?? (() => new Date());
    this.#path = `/api/v1/namespaces/${options.namespace}/secrets`;
    this.#secrets = [PLUGGED_SECRET, SELF_SIGNED_SECRET].map(
      (name) =>
        new Watched<SecretTexts>({
          api: options.api,
          path: this.#path,
          fieldSelector: `metadata.name=${name}`,
          log: options.log,
          times: options.times,
          pick: pickSecret,
          changed: () => this.#reload(),
        }),
    );
  }

  /** The authority of now. @throws Error before {@link start} has resolved */
  get authority(): Authority {
    if (this.#authority === undefined) throw new Error('the root of trust is not known yet');
    return this.#authority;
  }

  /** Name of the Secret in use. */
  get source(): string | undefined {
    return this.#texts?.name;
  }

  onChange(listener: () => void): void {
    this.#listeners.add(listener);
  }

  /**
   * Resolves with a root: the one that is there, or a new one that is there for all replicas.
   * @throws Error where the Secret that is there cannot be used
   */
  async start(): Promise<void> {
    await Promise.all(this.#secrets.map((secret) => secret.start()));
    const backoff = new Backoff({ initialMs: 200, maxMs: 10_000 });
    while (this.#found() === undefined) {
      try {
        const root = await makeRoot(this.#now());
        await this.#create(selfSignedData(root.certificate, root.key, root.certificate));
        this.#log.info({ event: 'root_made', secret: SELF_SIGNED_SECRET }, 'made the root of trust of this cluster');
      } catch (error) {
        this.#log.error({ event: 'root_failed', err: error }, 'cannot make the root of trust; trying again');
      }
      await sleep(backoff.next(), undefined, { signal: this.#stop.signal });
    }
    await this.#load();
    if (this.#authority === undefined) throw new Error('there is no root of trust that can be used');
    this.#timer = setInterval(() => void this.#rotate(), ROTATION_CHECK_MS);
  }

  /** The replica that leads takes the steps of rotations and brings back a Secret that was removed. */
  set leading(leading: boolean) {
    this.#leading = leading;
    if (leading) void this.#rotate();
  }

  async close(): Promise<void> {
    this.#stop.abort();
    clearInterval(this.#timer);
    await Promise.all(this.#secrets.map((secret) => secret.close()));
    await this.#loading;
  }

  #found(): SecretTexts | undefined {
    for (const secret of this.#secrets) for (const texts of secret.items().values()) return texts;
    return undefined;
  }

  /** Creates the Secret unless it is there: of several replicas one is first, and the others use what it made. */
  async #create(data: Readonly<Record<string, string>>): Promise<void> {
    const body = {
      apiVersion: 'v1',
      kind: 'Secret',
      type: SELF_SIGNED_TYPE,
      metadata: { name: SELF_SIGNED_SECRET, namespace: this.#options.namespace },
      data: encode(data),
    };
    try {
      await this.#options.api.request('POST', this.#path, { body });
    } catch (error) {
      if (!(error instanceof ApiError && error.reason === 'AlreadyExists')) throw error;
    }
  }

  #reload(): void {
    // Before the start has a root it looks by itself.
    if (this.#authority === undefined) return;
    this.#loading = this.#loading
      .then(() => this.#load())
      .catch((error: unknown) => {
        this.#log.error(
          { event: 'root_refused', err: error },
          `${(error as Error).message}; the root of trust stays as it was`,
        );
      });
  }

  async #load(): Promise<void> {
    const texts = this.#found();
    if (texts === undefined) {
      this.#log.error({ event: 'root_removed' }, 'the Secret of the root of trust is gone; what it held stays in use');
      const last = this.#texts;
      if (this.#leading && last?.name === SELF_SIGNED_SECRET) {
        await this.#create(last.data);
        this.#log.warn({ event: 'root_restored', secret: SELF_SIGNED_SECRET }, 'brought the Secret of the root back');
      }
      return;
    }
    const same = this.#texts !== undefined && JSON.stringify(texts.data) === JSON.stringify(this.#texts.data);
    if (!same) {
      const root = await readRootSecret(texts, this.#now());
      const before = this.#authority?.bundle;
      if (before !== undefined && !overlaps(before, root.bundle)) {
        throw new Error(
          `Secret ${texts.name}: its root-cert.pem shares no root with the one in use, so proxies would not trust each ` +
            'other for a while; put the old root into it as well, or restart all controllers to accept that',
        );
      }
      this.#authority = createAuthority(root);
      this.#log.info(
        {
          event: 'root_loaded',
          secret: texts.name,
          subject: root.certificate.subject,
          notAfter: root.certificate.notAfter.toISOString(),
          roots: fingerprints(root.bundle).size,
          intermediates: root.chain.length,
        },
        'the root of trust is in use',
      );
      this.#texts = texts;
      for (const listener of this.#listeners) listener();
    }
    this.#texts = texts;
    await this.#rotate();
  }

  /** Takes the step of a rotation that is due. */
  async #rotate(): Promise<void> {
    const texts = this.#texts;
    if (!this.#leading || texts?.name !== SELF_SIGNED_SECRET) return;
    if (this.#options.clockIsRight?.() === false) return;
    try {
      const step = await nextStep(texts, this.#options.ttlSeconds, this.#now());
      if (step === undefined) return;
      await this.#options.api.request('PATCH', `${this.#path}/${SELF_SIGNED_SECRET}`, {
        // The version makes it fail where another replica was first.
        body: {
          metadata: { resourceVersion: texts.resourceVersion, annotations: step.annotations },
          data: encode(step.data),
        },
      });
      this.#log.info({ event: 'root_rotation', phase: step.phase }, 'took a step of replacing the root of trust');
    } catch (error) {
      if (error instanceof ApiError && error.reason === 'Conflict') return;
      this.#log.error(
        { event: 'root_rotation_failed', err: error },
        'a step of replacing the root failed; trying again',
      );
    }
  }
}

function overlaps(before: string, after: string): boolean {
  const known = fingerprints(before);
  return [...fingerprints(after)].some((fingerprint) => known.has(fingerprint));
}

function encode(data: Readonly<Record<string, string | null>>): Record<string, string | null> {
  return Object.fromEntries(
    Object.entries(data).map(([key, text]) => [key, text === null ? null : Buffer.from(text).toString('base64')]),
  );
}

function pickSecret(object: ApiObject): SecretTexts {
  const { metadata, data } = object as ApiObject & {
    readonly metadata: { readonly annotations?: Readonly<Record<string, string>> };
    readonly data?: Readonly<Record<string, string>>;
  };
  return {
    name: metadata.name,
    resourceVersion: metadata.resourceVersion ?? '',
    annotations: metadata.annotations ?? {},
    data: Object.fromEntries(
      Object.entries(data ?? {}).map(([key, value]) => [key, Buffer.from(value, 'base64').toString('utf8')]),
    ),
  };
}
