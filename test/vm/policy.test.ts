/** Policy between pods of two nodes (in one guest), through the whole mesh, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest('policy', ['mesh-policy', 'mesh-policy-forms']);
