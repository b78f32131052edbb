/** A cable between two guests, with the means to cut it; what passes can be recorded by qemu, outside of both guests. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { waitFor } from '../../../src/lab/wait.ts';
import { makePlace, removePlace } from './place.ts';

/** Plug it into two guests by their `networks`. Whoever made it disposes of it, after the guests. */
export class Wire {
  readonly directory = makePlace();
  #plugged = 0;

  /** Argument of qemu's -netdev. The first guest is the one that listens; for the second this waits until it does. */
  async plug(id: string): Promise<string> {
    if (this.#plugged === 2) throw new Error('a wire has two ends, and both are plugged in');
    const path = join(this.directory, 'wire');
    const second = this.#plugged++ === 1;
    if (second) await waitFor('the guest at the other end of the wire to start', () => existsSync(path));
    return `stream,id=${id},server=${second ? 'off' : 'on'},addr.type=unix,addr.path=${path}`;
  }

  dispose(): void {
    removePlace(this.directory);
  }
}
