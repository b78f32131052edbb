/** Pods as a kubelet makes them: a cgroup named by UID first, then a network namespace, then a process in both. */

import { randomUUID } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { patient } from '../../../src/lab/wait.ts';
import { type CaptureLab, type Json, type LabPod, makeCgroup, Peer, removeCgroup } from './lab.ts';

/** A node's part of the cgroup tree, of the test's own. */
export class Kubepods {
  readonly #name = `ebb-test-${process.pid}`;
  readonly #lab: CaptureLab;
  readonly directory: string;

  constructor(lab: CaptureLab) {
    this.#lab = lab;
    removeCgroup(this.#name);
    this.directory = makeCgroup(this.#name);
  }

  /** Makes a pod's cgroup by the driver's rules; returns its path and UID. */
  make(driver: 'cgroupfs' | 'systemd' = 'cgroupfs', uid = randomUUID() as string): { uid: string; cgroup: string } {
    const parent = driver === 'cgroupfs' ? 'kubepods/besteffort' : 'kubepods.slice/kubepods-besteffort.slice';
    const own = driver === 'cgroupfs' ? `pod${uid}` : `kubepods-besteffort-pod${uid.replaceAll('-', '_')}.slice`;
    const cgroup = join(this.directory, parent, own);
    mkdirSync(join(cgroup, 'container'), { recursive: true });
    return { uid, cgroup };
  }

  /** Makes a cgroup that is no pod. */
  other(name: string): void {
    mkdirSync(join(this.directory, name));
  }

  /** Starts a peer whose first step is to be in the pod's cgroup and namespace; without a pod, in the node's. */
  start(cgroup: string, pod: LabPod | undefined, ...argv: string[]): Peer {
    const enter = pod ? ['nsenter', `--net=${pod.path}`] : [];
    const script = 'echo $$ > "$1"; shift; exec "$@"';
    const command = ['sh', '-c', script, 'sh', `${cgroup}/container/cgroup.procs`, ...enter, ...argv];
    return this.#lab.keep(new Peer(command));
  }

  /** The only line of a peer that connects from there. */
  async connect(cgroup: string, pod: LabPod | undefined, ...argv: string[]): Promise<Json> {
    const patience = ['env', `CONNECT_SECONDS=${patient(2)}`];
    const peer = this.start(cgroup, pod, ...patience, this.#lab.peer, 'connect', ...argv);
    return await peer.next((line) => 'ok' in line, 0, 20_000);
  }

  /** After the lab's processes have ended. */
  remove(): void {
    removeCgroup(this.#name);
  }
}
