/** Capture of very many connections at once, and of those that were open before, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest('load', ['capture-hostile', 'capture-inherited']);
