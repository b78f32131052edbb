/** Requests to the Kubernetes API: JSON in, JSON out, each with an end in time. */
import { Agent as HttpAgent, type IncomingMessage, request as requestHttp } from 'node:http';
import { Agent as HttpsAgent, request as requestHttps } from 'node:https';
import { type ClockOffset, now, offsetByDate } from '../clock.js';
import { isRefusedForTime } from '../clock-skew.js';
import { type Access, kubeconfigAccess, SERVICE_ACCOUNT_DIRECTORY, serviceAccountAccess } from './access.js';

/** A request that failed: an answer of the server (`status` 400 and up), or none (`status` 0). */
export class ApiError extends Error {
  /** HTTP status, or the code of an ERROR event of a watch; 0 where the server could not be asked. */
  readonly status: number;
  /** Kubernetes' `Status.reason` (`NotFound`, `AlreadyExists`, `Expired`), or `Unreachable`, `Timeout`, `Aborted`, `BadAnswer`. */
  readonly reason: string;
  /** How long the server asks to be left alone, in milliseconds (429 and 503). */
  readonly retryAfterMs: number | undefined;

  constructor(status: number, reason: string, message: string, retryAfterMs?: number) {
    super(message);
    this.name = 'ApiError';
    this.status = status;
    this.reason = reason;
    this.retryAfterMs = retryAfterMs;
  }
}

export interface ApiOptions {
  /** Path of a kubeconfig; without one this process is a pod. */
  readonly kubeconfig?: string | undefined;
  /** URL of the server, instead of what Kubernetes tells a pod. */
  readonly server?: string | undefined;
  /** Folder of `token`, `ca.crt` and `namespace`, instead of where Kubernetes mounts them. */
  readonly serviceAccountDirectory?: string | undefined;
  readonly userAgent?: string | undefined;
  /** Told of each answer, for its Date: how far the server's clock is ahead. */
  readonly onTime?: ((offset: ClockOffset | undefined) => void) | undefined;
}

export interface RequestOptions {
  readonly query?: Readonly<Record<string, string | number | boolean | undefined>> | undefined;
  /** Sent as JSON. */
  readonly body?: unknown;
  /** `application/json`; for PATCH one of Kubernetes' patch types, by default a merge patch. */
  readonly contentType?: string | undefined;
  /** Whole time that the request may take, 30 s by default. */
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** The Kubernetes API. Nothing is remembered between requests but connections, so it never has to be opened again. */
export interface Api {
  /**
   * One request.
   * @param path such as `/api/v1/namespaces/default/pods`
   * @returns the decoded answer
   * @throws ApiError
   */
  request<T = unknown>(method: string, path: string, options?: RequestOptions): Promise<T>;
  /**
   * One GET whose answer is read as it comes; `timeoutMs` is the time until it begins.
   * @throws ApiError
   */
  stream(path: string, options?: RequestOptions): Promise<IncomingMessage>;
  /** Namespace of the pod, or of the kubeconfig's context once a request was made. */
  namespace(): string | undefined;
  /** Closes idle connections. Requests that run go on. */
  close(): void;
  /** For messages. */
  readonly description: string;
}

const DEFAULT_TIMEOUT_MS = 30_000;
/** Dead connections are noticed by TCP where nothing is sent for long. */
const TCP_KEEPALIVE_MS = 15_000;
/** No answer to a single request is near this; a page of 500 objects may be. */
const MAX_ANSWER_BYTES = 256 << 20;

/**
 * Opens the API; nothing is asked of it yet.
 * @throws Error where this is neither a pod nor a kubeconfig is given
 */
export function openApi(options: ApiOptions = {}): Api {
  return new ApiClient(options);
}

class ApiClient implements Api {
  readonly #source;
  readonly #userAgent: string;
  readonly #onTime: ApiOptions['onTime'];
  #agents = newAgents();

  constructor({ kubeconfig, server, serviceAccountDirectory, userAgent, onTime }: ApiOptions) {
    this.#source =
      kubeconfig === undefined
        ? serviceAccountAccess(serviceAccountDirectory ?? SERVICE_ACCOUNT_DIRECTORY, server)
        : kubeconfigAccess(kubeconfig);
    this.#userAgent = userAgent ?? 'ebbtide';
    this.#onTime = onTime;
  }

  get description(): string {
    return this.#source.description;
  }

  namespace(): string | undefined {
    return this.#source.namespace();
  }

  async request<T>(method: string, path: string, options: RequestOptions = {}): Promise<T> {
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    // A timer of its own: a timeout signal inside AbortSignal.any may be collected before it fires.
    const timeout = new AbortController();
    const timer = setTimeout(() => timeout.abort(), timeoutMs);
    const signal = options.signal === undefined ? timeout.signal : AbortSignal.any([timeout.signal, options.signal]);
    try {
      const response = await this.#send(method, path, options, signal);
      const text = await readAll(response);
      if ((response.statusCode ?? 0) >= 400) throw this.#refusal(method, path, response, text);
      return parse(text, method, path) as T;
    } catch (error) {
      throw this.#explain(error, method, path, timeout.signal, timeoutMs, options.signal);
    } finally {
      clearTimeout(timer);
    }
  }

  async stream(path: string, options: RequestOptions = {}): Promise<IncomingMessage> {
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    const timeout = new AbortController();
    const timer = setTimeout(() => timeout.abort(), timeoutMs);
    const signal = options.signal === undefined ? timeout.signal : AbortSignal.any([timeout.signal, options.signal]);
    try {
      const response = await this.#send('GET', path, options, signal);
      if ((response.statusCode ?? 0) >= 400) throw this.#refusal('GET', path, response, await readAll(response));
      return response;
    } catch (error) {
      throw this.#explain(error, 'GET', path, timeout.signal, timeoutMs, options.signal);
    } finally {
      clearTimeout(timer);
    }
  }

  close(): void {
    this.#agents.http.destroy();
    this.#agents.https.destroy();
    this.#agents = newAgents();
  }

  async #send(
    method: string,
    path: string,
    { query, body, contentType }: RequestOptions,
    signal: AbortSignal,
  ): Promise<IncomingMessage> {
    signal.throwIfAborted();
    const access: Access = await this.#source.access();
    signal.throwIfAborted();
    const url = new URL(access.server + path);
    for (const [name, value] of Object.entries(query ?? {})) {
      if (value !== undefined) url.searchParams.set(name, String(value));
    }
    const payload = body === undefined ? undefined : Buffer.from(JSON.stringify(body));
    const headers: Record<string, string | number> = {
      ...access.headers,
      Accept: 'application/json',
      'User-Agent': this.#userAgent,
    };
    if (payload !== undefined) {
      headers['Content-Type'] =
        contentType ?? (method === 'PATCH' ? 'application/merge-patch+json' : 'application/json');
      headers['Content-Length'] = payload.length;
    }
    const secure = url.protocol === 'https:';
    const { ca, cert, key, servername, rejectUnauthorized } = access;
    const tls = Object.entries({ ca, cert, key, servername, rejectUnauthorized }).filter(
      ([, value]) => value !== undefined,
    );
    const agent = access.agent ?? (secure ? this.#agents.https : this.#agents.http);
    const sent = now();
    return new Promise((resolve, reject) => {
      const request = (secure ? requestHttps : requestHttp)(
        url,
        { method, headers, signal, agent, ...Object.fromEntries(tls) },
        (response) => {
          this.#onTime?.(offsetByDate(response.headers.date, sent, now()));
          resolve(response);
        },
      );
      request.on('error', reject);
      request.end(payload);
    });
  }

  #refusal(method: string, path: string, response: IncomingMessage, text: string): ApiError {
    const status = response.statusCode ?? 0;
    if (status === 401) this.#source.refused();
    let reason = response.statusMessage ?? '';
    let message = text.slice(0, 500);
    try {
      const answer = JSON.parse(text) as { readonly reason?: string; readonly message?: string };
      if (typeof answer.reason === 'string') reason = answer.reason;
      if (typeof answer.message === 'string') message = answer.message;
    } catch {
      // A proxy or load balancer in between answers what it likes; its text is the message then.
    }
    const seconds = Number(response.headers['retry-after']);
    return new ApiError(
      status,
      reason,
      `${method} ${path} as ${this.#source.description}: ${status} ${message}`,
      seconds > 0 && seconds < 3600 ? seconds * 1000 : undefined,
    );
  }

  #explain(
    error: unknown,
    method: string,
    path: string,
    timeout: AbortSignal,
    timeoutMs: number,
    signal: AbortSignal | undefined,
  ): ApiError {
    if (error instanceof ApiError) return error;
    const what = `${method} ${path}`;
    if (signal?.aborted) return new ApiError(0, 'Aborted', `${what}: given up`);
    this.#renewConnections();
    if (timeout.aborted) return new ApiError(0, 'Timeout', `${what}: no whole answer within ${timeoutMs} ms`);
    const { message } = error as Error;
    const time = isRefusedForTime(message)
      ? ` (clock skew? by the clock of this machine it is ${new Date().toISOString()})`
      : '';
    return new ApiError(0, 'Unreachable', `${what}: ${message}${time}`);
  }

  /** Idle connections to a server that went away in silence would each cost a timeout: the next request begins with a new one. */
  #renewConnections(): void {
    for (const agent of [this.#agents.http, this.#agents.https]) {
      agent.maxFreeSockets = 0;
      for (const sockets of Object.values(agent.freeSockets)) for (const socket of sockets ?? []) socket.destroy();
    }
    this.#agents = newAgents();
  }
}

function newAgents(): { readonly http: HttpAgent; readonly https: HttpsAgent } {
  const options = { keepAlive: true, keepAliveMsecs: TCP_KEEPALIVE_MS, maxFreeSockets: 4 };
  return { http: new HttpAgent(options), https: new HttpsAgent(options) };
}

async function readAll(response: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    size += chunk.length;
    if (size > MAX_ANSWER_BYTES) throw new Error(`the answer is larger than ${MAX_ANSWER_BYTES} bytes`);
    chunks.push(chunk);
  }
  if (!response.complete) throw new Error('the connection ended within the answer');
  return Buffer.concat(chunks).toString('utf8');
}

function parse(text: string, method: string, path: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ApiError(0, 'BadAnswer', `${method} ${path}: the answer is no JSON: ${(error as Error).message}`);
  }
}
