/** The roots of trust, published to every namespace as a ConfigMap, where proxies and applications mount them. */
import { type Api, ApiError, type ApiObject, Watched, type WatchedOptions } from '../../mesh/api/index.js';
import { ROOT_CONFIG_MAP, ROOT_CONFIG_MAP_KEY } from '../../mesh/labels.js';
import type { Logger } from '../../mesh/log.js';

const LABEL = { 'istio.io/config': 'true' };
/** Namespaces that hold no pods of anybody. */
const EXCLUDED: readonly string[] = ['kube-public', 'kube-node-lease'];
/** Writes at once: a new root means one for every namespace. */
const CONCURRENT = 8;
const RETRY_MS = 10_000;

interface Published {
  readonly bundle: string | undefined;
  readonly label: string | undefined;
}

export interface RootDistributionOptions {
  readonly api: Api;
  readonly log: Logger;
  namespaces(): Iterable<string>;
  bundle(): string;
  readonly times?: WatchedOptions<unknown>['times'];
  /** Pause after a write that failed, in milliseconds. */
  readonly retryMs?: number | undefined;
}

export class RootDistribution {
  readonly #options: RootDistributionOptions;
  readonly #maps: Watched<Published>;
  #leading = false;
  #running = false;
  #again = false;
  #retry: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(options: RootDistributionOptions) {
    this.#options = options;
    this.#maps = new Watched<Published>({
      api: options.api,
      path: '/api/v1/configmaps',
      fieldSelector: `metadata.name=${ROOT_CONFIG_MAP}`,
      log: options.log,
      times: options.times,
      pick: pickPublished,
      changed: () => this.reconcile(),
    });
  }

  start(): Promise<void> {
    return this.#maps.start();
  }

  set leading(leading: boolean) {
    this.#leading = leading;
    this.reconcile();
  }

  /** Writes what is missing or was changed, soon; called whenever namespaces or roots changed. */
  reconcile(): void {
    if (!this.#leading || this.#closed) return;
    if (this.#running) {
      this.#again = true;
      return;
    }
    this.#running = true;
    clearTimeout(this.#retry);
    this.#run()
      .then((failed) => {
        if (failed > 0 && !this.#closed) {
          this.#retry = setTimeout(() => this.reconcile(), this.#options.retryMs ?? RETRY_MS);
        }
      })
      .finally(() => {
        this.#running = false;
        if (this.#again) {
          this.#again = false;
          this.reconcile();
        }
      });
  }

  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#retry);
    await this.#maps.close();
  }

  /** @returns how many writes failed */
  async #run(): Promise<number> {
    const bundle = this.#options.bundle();
    const known = this.#maps.items();
    const due: { readonly namespace: string; readonly exists: boolean }[] = [];
    for (const namespace of this.#options.namespaces()) {
      if (EXCLUDED.includes(namespace)) continue;
      const published = known.get(`${namespace}/${ROOT_CONFIG_MAP}`);
      if (published?.bundle === bundle && published.label === 'true') continue;
      due.push({ namespace, exists: published !== undefined });
    }
    let failed = 0;
    let written = 0;
    const work = async (): Promise<void> => {
      for (let next = due.pop(); next !== undefined; next = due.pop()) {
        if (!this.#leading || this.#closed) return;
        try {
          await this.#write(next.namespace, next.exists, bundle);
          written++;
        } catch (error) {
          // A namespace that is being deleted takes nothing new; it is gone soon.
          const ending = error instanceof ApiError && /being terminated|not found/.test(error.message);
          if (!ending) {
            this.#options.log.error(
              { event: 'root_publish_failed', namespace: next.namespace, err: error },
              'cannot publish the root of trust in a namespace; trying again',
            );
          }
          failed++;
        }
      }
    };
    await Promise.all(Array.from({ length: CONCURRENT }, work));
    if (written > 0) {
      this.#options.log.info({ event: 'root_published', namespaces: written }, 'published the root of trust');
    }
    return failed;
  }

  async #write(namespace: string, exists: boolean, bundle: string): Promise<void> {
    const path = `/api/v1/namespaces/${namespace}/configmaps`;
    const content = { metadata: { name: ROOT_CONFIG_MAP, labels: LABEL }, data: { [ROOT_CONFIG_MAP_KEY]: bundle } };
    if (!exists) {
      try {
        await this.#options.api.request('POST', path, { body: { apiVersion: 'v1', kind: 'ConfigMap', ...content } });
        return;
      } catch (error) {
        if (!(error instanceof ApiError && error.reason === 'AlreadyExists')) throw error;
      }
    }
    await this.#options.api.request('PATCH', `${path}/${ROOT_CONFIG_MAP}`, { body: content });
  }
}

function pickPublished(object: ApiObject): Published {
  const { metadata, data } = object as ApiObject & {
    readonly metadata: { readonly labels?: Readonly<Record<string, string>> };
    readonly data?: Readonly<Record<string, string>>;
  };
  return { bundle: data?.[ROOT_CONFIG_MAP_KEY], label: metadata.labels?.['istio.io/config'] };
}
