/** The boot guard's executable as a unit would run it, and agents as real processes beside it. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { stringify } from 'yaml';
import { patient } from '../../../src/lab/wait.ts';
import type { CaptureLab, LabPod } from './lab.ts';
import type { Kubepods } from './newcomers.ts';

const PROGRAM = fileURLToPath(new URL('../../../native/build/Release/ebbtide-boot-guard', import.meta.url));
const EBBTIDE = fileURLToPath(new URL('../../../dist/main.js', import.meta.url));
export const NODE_NAME = 'node-b.example';

export interface Ran {
  readonly code: number | null;
  readonly said: string;
}

/** One node: where its guard and its agents pin, and which pods its manifests have. */
export class BootNode {
  readonly #lab: CaptureLab;
  readonly #kubepods: Kubepods;
  readonly #children: ChildProcess[] = [];
  readonly bpffs: string;
  readonly pins: string;
  readonly manifests: string;
  readonly run: string;
  readonly report: string;

  constructor(lab: CaptureLab, kubepods: Kubepods) {
    this.#lab = lab;
    this.#kubepods = kubepods;
    this.bpffs = lab.pinDirectory('').replace(/\/$/, '');
    this.pins = join(this.bpffs, `ebbtide-${NODE_NAME.replace('.', '_')}`);
    this.manifests = join(lab.directory, 'manifests');
    this.run = join(lab.directory, 'run');
    this.report = join(this.run, 'boot-guard.json');
    for (const directory of [this.bpffs, this.manifests, this.run]) mkdirSync(directory, { recursive: true });
    this.#write('namespace.yaml', {
      apiVersion: 'v1',
      kind: 'Namespace',
      metadata: { name: 'team', labels: { 'istio.io/dataplane-mode': 'ambient' } },
    });
  }

  get socket(): string {
    return join(this.run, 'zds.sock');
  }

  #argv(command: string): string[] {
    const scope = command === 'guard' ? ['--pod-cgroup', this.#kubepods.directory] : [];
    return [command, '--node', NODE_NAME, '--bpffs', this.bpffs, '--report', this.report, ...scope];
  }

  /** Runs the executable to its end. */
  guard(command: 'guard' | 'release' = 'guard', ...flags: string[]): Ran {
    const { status, stderr } = spawnSync(PROGRAM, [...this.#argv(command), ...flags], {
      encoding: 'utf8',
      timeout: patient(30_000),
    });
    return { code: status, said: stderr };
  }

  /** Starts `wait`; resolves when it has ended. */
  async wait(...flags: string[]): Promise<Ran> {
    const child = this.#keep(
      spawn(PROGRAM, [...this.#argv('wait'), ...flags], { stdio: ['ignore', 'ignore', 'pipe'] }),
    );
    let said = '';
    child.stderr?.on('data', (text: Buffer) => {
      said += text;
    });
    return await new Promise((resolve) => child.once('exit', (code) => resolve({ code, said })));
  }

  /** A pod of the mesh in the node's manifests, with a cgroup named by its UID, as a kubelet has it. */
  declare(name: string, uid: string, pod: LabPod): void {
    this.#write(`${name}.yaml`, {
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name, namespace: 'team', uid, annotations: { 'ebbtide.dev/netns': pod.path } },
      spec: { nodeName: NODE_NAME, serviceAccountName: 'client' },
      status: { phase: 'Running', podIPs: pod.pod.addresses.map((ip) => ({ ip })) },
    });
  }

  /** Starts an agent that holds new pods of this node and leaves all captured when it ends. */
  agent(...flags: string[]): AgentProcess {
    const hold = ['--hold', 'refuse', '--pod-cgroup', this.#kubepods.directory, '--keep'];
    const argv = [EBBTIDE, 'agent', '--manifests', this.manifests, '--bpffs', this.bpffs, ...hold, ...flags];
    const env = { ...process.env, NODE_NAME, INPOD_UDS: this.socket };
    return new AgentProcess(this.#keep(spawn(process.execPath, argv, { env, stdio: ['ignore', 'pipe', 'pipe'] })));
  }

  #write(name: string, object: unknown): void {
    writeFileSync(join(this.manifests, name), stringify(object));
  }

  #keep(child: ChildProcess): ChildProcess {
    this.#children.push(child);
    return child;
  }

  /** Ends what still runs, and takes this node out of the kernel; the lab removes its mount. */
  async remove(): Promise<void> {
    for (const child of this.#children) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      const gone = new Promise((resolve) => child.once('exit', resolve));
      child.kill('SIGKILL');
      await gone;
    }
    const [program, ...argv] = this.uninstallCommand();
    spawnSync(program, argv);
  }

  /** Takes what this node's agents left out of the kernel. */
  uninstallCommand(): [string, ...string[]] {
    return [process.execPath, EBBTIDE, 'uninstall', '--bpffs', this.bpffs, '--host-root', this.#lab.directory];
  }
}

export class AgentProcess {
  readonly process: ChildProcess;
  readonly exit: Promise<number | string>;
  output = '';

  constructor(child: ChildProcess) {
    this.process = child;
    for (const stream of [child.stdout, child.stderr]) {
      stream?.on('data', (text: Buffer) => {
        this.output += text;
      });
    }
    this.exit = new Promise((resolve) => child.once('exit', (code, signal) => resolve(signal ?? code ?? -1)));
  }

  /** Whether it has said that this happened. */
  said(event: string): boolean {
    return this.output.includes(`"event":"${event}"`);
  }

  async kill(): Promise<void> {
    this.process.kill('SIGKILL');
    await this.exit;
  }
}
