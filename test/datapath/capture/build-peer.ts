/** How peer.c is built, wherever its program is wanted. */
import { fileURLToPath } from 'node:url';

const SOURCE = fileURLToPath(new URL('peer.c', import.meta.url));

/** The compiler's command. @param program where the program is put */
export const buildPeerCommand = (program: string): string[] => [
  ...['gcc', '-O1', '-Wall', '-D_GNU_SOURCE', '-o', program],
  SOURCE,
];
