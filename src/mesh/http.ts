/** Small HTTP servers: a table of paths, short time limits, no more. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

export interface HttpAnswer {
  readonly status: number;
  /** Default: text/plain. */
  readonly type?: string;
  readonly body: string;
}

export interface HttpRoute {
  readonly methods: readonly string[];
  readonly handle: (query: URLSearchParams, request: IncomingMessage) => HttpAnswer | Promise<HttpAnswer>;
}

export interface HttpListener {
  readonly port: number;
  close(): void;
}

export interface HttpOptions {
  readonly what: string;
  /** Undefined: all addresses, both families. On a loopback address only this host is served. */
  readonly host?: string;
  readonly port: number;
  readonly routes: ReadonlyMap<string, HttpRoute>;
  readonly onError: (error: Error) => void;
}

const LIMITS = { headersTimeout: 5000, requestTimeout: 5000, keepAliveTimeout: 5000, maxHeaderSize: 8192 };
const MAX_CONNECTIONS = 64;

/** Resolves once it listens; rejects with what to do where it cannot. */
export async function listenHttp(options: HttpOptions): Promise<HttpListener> {
  const server = createServer(LIMITS, (request, response) => {
    void answer(options, request, response);
  });
  server.maxConnections = MAX_CONNECTIONS;
  if (isLoopback(options.host)) {
    // A node with route_localnet, which kube-proxy may set, takes packets for 127.0.0.1 also from its pods.
    server.on('connection', (socket) => {
      if (!isLoopback(socket.remoteAddress)) socket.destroy();
    });
  }
  await listen(server, options);
  server.on('error', options.onError);
  return {
    port: (server.address() as AddressInfo).port,
    close() {
      server.close();
      server.closeAllConnections();
    },
  };
}

const isLoopback = (address: string | undefined): boolean => address === '::1' || address?.startsWith('127.') === true;

async function answer(options: HttpOptions, request: IncomingMessage, response: ServerResponse): Promise<void> {
  let result: HttpAnswer;
  try {
    const [path = '/', query = ''] = (request.url ?? '/').split('?', 2);
    const route = options.routes.get(path);
    const method = request.method ?? '';
    if (route === undefined) {
      result = { status: 404, body: `no such path; there are: ${[...options.routes.keys()].join(' ')}\n` };
    } else if (!route.methods.includes(method)) {
      response.setHeader('allow', route.methods.join(', '));
      result = { status: 405, body: `${path} takes ${route.methods.join(' or ')}\n` };
    } else result = await route.handle(new URLSearchParams(query), request);
  } catch (error) {
    options.onError(error as Error);
    result = { status: 500, body: `${(error as Error).message}\n` };
  }
  request.resume();
  response.writeHead(result.status, {
    'content-type': result.type ?? 'text/plain; charset=utf-8',
    'content-length': Buffer.byteLength(result.body),
    'cache-control': 'no-store',
  });
  response.end(request.method === 'HEAD' ? undefined : result.body);
}

function listen(server: Server, { what, host, port }: HttpOptions): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      const hint =
        error.code === 'EADDRINUSE'
          ? '; another process of the mesh runs in this network namespace, or give another port'
          : '';
      reject(new Error(`cannot listen for ${what} on port ${port}: ${error.message}${hint}`));
    });
    server.listen(host === undefined ? { port } : { port, host }, () => {
      server.removeAllListeners('error');
      resolve();
    });
  });
}
