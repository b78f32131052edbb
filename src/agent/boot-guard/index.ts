/**
 * The boot guard: after a boot nothing of the mesh is in the kernel, and pods that start before the agent would speak in clear.
 * A small program of the node (native/boot-guard), started by systemd before the kubelet, holds new pods until the agent comes.
 */
export { type Installed, inspect, install, isInstalled, remove, UnsuitableNode } from './install.js';
export { BootGuardKeeper } from './keeper.js';
export { type BootReport, readBootReport } from './report.js';
export { type BootGuardOptions, DEFAULT_EXEC_DIRECTORY, type OnFailure } from './units.js';
