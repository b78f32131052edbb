/** Boots with pods before the agent, agents that crash again and again, and a bpffs that somebody empties, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest('crashes', ['boot-guard', 'pins-wiped']);
