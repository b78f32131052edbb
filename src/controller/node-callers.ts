/** Callers of a mesh without a cluster: whoever has the token of a node is its proxy. */
import { type Caller, type Callers, Refusal } from './callers.js';
import type { Places } from './places.js';
import type { NodeTokens } from './tokens.js';

export class NodeCallers implements Callers {
  readonly #tokens: NodeTokens;
  readonly #places: Places;

  constructor(tokens: NodeTokens, places: Places) {
    this.#tokens = tokens;
    this.#places = places;
  }

  authenticate(token: string): Caller {
    const node = this.#tokens.nodeOf(token);
    if (node === undefined) throw new Refusal('unknown token');
    return { node };
  }

  remains({ node }: Caller): boolean {
    return this.#tokens.has(node);
  }

  runsOn(node: string, namespace: string, serviceAccount: string): boolean {
    return this.#places.has(node, namespace, serviceAccount);
  }
}
