/** Guests for tests: virtual machines with Debian's kernels that run this checkout. See {@link startGuest}. */
export { chosenKernel } from './chosen.ts';
export { Guest, type GuestNetwork, type GuestOptions, type GuestRunOptions, startGuest } from './guest.ts';
export type { GuestProcess } from './guest-process.ts';
export { KERNELS, type KernelName } from './kernels.ts';
export { type BackgroundClient, type ClientReport, isOf, VmNode, type VmPod, WIRE_DEVICE } from './node.ts';
export { Pair, type PairOptions } from './pair.ts';
export { sweepPlaces } from './place.ts';
export { Wire } from './wire.ts';
