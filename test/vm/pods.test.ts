/**
 * Pods that are held until they are captured, the life of the capture with its agents, and policy between pods of two nodes (in
 * one guest) through the whole mesh, on the kernel of a guest. The forms of policies (mesh-policy-forms) are matched in the engine,
 * which no kernel changes.
 */
import { runInGuest } from './lib/suite.ts';

runInGuest('pods', ['capture-hold', 'capture-lifecycle', 'mesh-policy']);
