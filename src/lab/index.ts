/** The lab: two nodes with pods on this machine, for the demo, the tests and the benchmark. */
export { type Finished, must, run } from './exec.js';
export { cgroup2Root, missingPrograms, sweep } from './ground.js';
export { Lab, Pod, type PodOptions } from './lab.js';
export { type Inventory, leftSince, takeInventory } from './leaks.js';
export { authorizationPolicy, type Manifest, namespaceManifest, peerAuthentication } from './manifests.js';
export { type AccessLine, EBBTIDE, MeshNode, type MeshOptions, type Metric, sumMetrics } from './mesh.js';
export { analyseCapture, type WireConnection, type WireReport } from './pcap.js';
export { LabProcess, placed } from './process.js';
export { nginxClients, startNginx, startRedis, startSshd } from './programs.js';
export { patient, sleep, waitFor } from './wait.js';
export type { WireRecording } from './wire.js';
