/** Node tokens: a random secret for each Node, which is how a proxy says to the controller which node it serves. */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { ensurePrivateDirectory, writeFileAtomic } from './files.js';

const TOKEN_BYTES = 32;
const TOKEN = /^[A-Za-z0-9_-]{43}$/;
/** A Node's name is a DNS subdomain; checked because it becomes the name of a file. */
const NODE_NAME = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$/;
const MAX_NODE_NAME = 253;

const digest = (token: string): Buffer => createHash('sha256').update(token).digest();

export interface TokenChange {
  readonly added: readonly string[];
  readonly removed: readonly string[];
  /** Names of Nodes that cannot be file names, hence get no token. */
  readonly refused: readonly string[];
}

/** Tokens of all Nodes in `directory`, one file a node, mode 0600. */
export class NodeTokens {
  readonly #directory: string;
  /** By hexadecimal SHA-256 of the token, so that looking one up tells nothing about it by its timing. */
  readonly #byDigest = new Map<string, { readonly node: string; readonly digest: Buffer }>();
  readonly #nodes = new Map<string, string>();

  constructor(directory: string) {
    ensurePrivateDirectory(directory);
    this.#directory = directory;
  }

  /**
   * Makes the set of nodes be `names`: new ones get a token (a file that is there is used again), gone ones lose theirs.
   * A node that was never seen by this process keeps its file: an empty folder at start must not void every token.
   */
  setNodes(names: Iterable<string>): TokenChange {
    const wanted = new Set(names);
    const added: string[] = [];
    const removed: string[] = [];
    const refused: string[] = [];
    for (const [node, key] of this.#nodes) {
      if (wanted.has(node)) continue;
      this.#nodes.delete(node);
      this.#byDigest.delete(key);
      rmSync(join(this.#directory, node), { force: true });
      removed.push(node);
    }
    for (const node of wanted) {
      if (this.#nodes.has(node)) continue;
      if (node.length > MAX_NODE_NAME || !NODE_NAME.test(node)) {
        refused.push(node);
        continue;
      }
      const hash = digest(this.#readOrMake(node));
      const key = hash.toString('hex');
      // Two nodes with one token would be one identity: a file copied by hand is replaced.
      if (this.#byDigest.has(key)) {
        const fresh = digest(this.#make(node));
        this.#byDigest.set(fresh.toString('hex'), { node, digest: fresh });
        this.#nodes.set(node, fresh.toString('hex'));
      } else {
        this.#byDigest.set(key, { node, digest: hash });
        this.#nodes.set(node, key);
      }
      added.push(node);
    }
    return { added, removed, refused };
  }

  has(node: string): boolean {
    return this.#nodes.has(node);
  }

  /** The node whose token this is, or undefined. */
  nodeOf(token: string): string | undefined {
    const hash = digest(token);
    const entry = this.#byDigest.get(hash.toString('hex'));
    return entry !== undefined && timingSafeEqual(entry.digest, hash) ? entry.node : undefined;
  }

  #readOrMake(node: string): string {
    try {
      const token = readFileSync(join(this.#directory, node), 'utf8').trim();
      if (TOKEN.test(token)) return token;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
    return this.#make(node);
  }

  #make(node: string): string {
    const token = randomBytes(TOKEN_BYTES).toString('base64url');
    writeFileAtomic(join(this.#directory, node), `${token}\n`, 0o600);
    return token;
  }
}
