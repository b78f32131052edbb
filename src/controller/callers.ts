/** Who calls the controller: proxies, each of one node, told apart by their tokens. */

/** A proxy that was let in. */
export interface Caller {
  /** The node that it serves. */
  readonly node: string;
  /** Its own pod, `namespace/name` and UID, where it is one. */
  readonly pod?: { readonly key: string; readonly uid: string };
}

export interface Callers {
  /**
   * Whose token it is.
   * @throws Refusal saying why the token is of nobody, for our own log
   */
  authenticate(token: string): Caller | Promise<Caller>;
  /** Whether a caller that was let in still is what it was. */
  remains(caller: Caller): boolean;
  /** Whether a pod of this service account, which has not ended, runs on the node. */
  runsOn(node: string, namespace: string, serviceAccount: string): boolean;
}

/** A caller that is refused: the reason is for our log; the caller learns only that it was refused. */
export class Refusal extends Error {}

/** That something failed which says nothing about the caller; it may come again. */
export class Unavailable extends Error {}
