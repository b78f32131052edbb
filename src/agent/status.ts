/**
 * Status of the agent over HTTP on a unix socket of mode 0600, asked from the datapath with each request; and where the next
 * agent of the node asks this one for it.
 */
import { rmSync } from 'node:fs';
import { createServer, request, type Server } from 'node:http';
import type { CaptureStatus } from './capture.js';
import type { PodReport } from './pods.js';

/** `GET /status`. */
export interface AgentStatus {
  readonly node: string;
  /** Processes of the proxies that are connected, oldest first; the last one gets the pods. */
  readonly proxies: readonly number[];
  readonly pods: readonly PodReport[];
  /** What is wrong with the manifests. */
  readonly problems: readonly { readonly file: string; readonly line?: number; readonly message: string }[];
}

/** Figures of 64 bits are decimal text in JSON. */
type OnTheWire<T> = { readonly [K in keyof T]: T[K] extends bigint ? string : T[K] };
export type CaptureStatusJson = OnTheWire<CaptureStatus>;

/** What the socket answers from. */
export interface StatusHandlers {
  status(): AgentStatus;
  /** Gives the node to another agent: when it returns, that one may have it. Missing where this agent does not. */
  handOver?(): void;
}

const HAND_OVER_PATH = '/handover';

/** Serves the status at a path; a socket file there is replaced, since the ZDS socket beside it tells who is the agent. */
export async function serveStatus(path: string, { status, handOver }: StatusHandlers): Promise<Server> {
  const server = createServer((incoming, outgoing) => {
    const answer = (code: number, body: unknown): void => {
      const text = JSON.stringify(body, (_, value: unknown) => (typeof value === 'bigint' ? value.toString() : value));
      outgoing.writeHead(code, { 'content-type': 'application/json', connection: 'close' }).end(`${text}\n`);
    };
    if (incoming.method === 'POST' && incoming.url === HAND_OVER_PATH && handOver !== undefined) {
      handOver();
      answer(200, { handedOver: true });
      return;
    }
    if (incoming.method !== 'GET' || incoming.url !== '/status') {
      answer(404, { error: 'there is GET /status only' });
      return;
    }
    try {
      answer(200, status());
    } catch (error) {
      answer(500, { error: (error as Error).message });
    }
  });
  server.maxConnections = 16;
  rmSync(path, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    // The file is made before listen returns; nobody else may ever open it.
    const mask = process.umask(0o177);
    try {
      server.listen(path, resolve);
    } finally {
      process.umask(mask);
    }
  });
  return server;
}

/** Asks an agent. @throws Error that says where it looked when no agent answers */
export async function readStatus(path: string): Promise<AgentStatus> {
  return (await ask(path, 'GET', '/status')) as AgentStatus;
}

/** Asks the agent that has this node to give it to this one. @throws Error when it does not, or does not answer */
export async function askForNode(path: string): Promise<void> {
  await ask(path, 'POST', HAND_OVER_PATH);
}

function ask(socketPath: string, method: string, path: string): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const failed = (error: Error): void => {
      reject(new Error(`no agent answers at ${socketPath}: ${error.message}; is it running, with the same INPOD_UDS?`));
    };
    const asked = request({ socketPath, method, path, timeout: 5000 }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (chunk: string) => {
        text += chunk;
      });
      response.on('error', failed);
      response.on('end', () => {
        try {
          if (response.statusCode !== 200) throw new Error(`status ${response.statusCode}: ${text.trim()}`);
          resolve(JSON.parse(text));
        } catch (error) {
          failed(error as Error);
        }
      });
    });
    asked.on('timeout', () => asked.destroy(new Error('no answer within 5 s')));
    asked.on('error', failed);
    asked.end();
  });
}
