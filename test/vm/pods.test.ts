/** Pods that are held until they are captured, and the life of the capture with its agents, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest('pods', ['capture-hold', 'capture-lifecycle']);
