/**
 * Agents that crash again and again with pods that start meanwhile, and a bpffs that somebody empties, on the kernel of a guest.
 * The rest of these files is about files and flags, which no kernel changes.
 */
import { runInGuest } from './lib/suite.ts';

runInGuest('crashes', ['boot-guard', 'pins-wiped'], {
  only: 'killed again and again|its pins are removed|with guard auto',
});
