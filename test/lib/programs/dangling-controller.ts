/**
 * The controller with one fault: a workload of its names a policy that it never sends, as a control plane with a lost push
 * would. Run as a program: `dangling-controller.ts MANIFESTS DATA ADDR:PORT POD POLICY`.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Lab, LabProcess, waitFor } from '../../../src/lab/index.ts';
import { CONTROL_ADDRESS } from '../../../src/lab/network.ts';
import { CONTROLLER_PORT } from '../../../src/mesh/ports.ts';

/** Starts it in the controller's place, with the controller's own data. @param pod name of the pod @param policy the key */
export async function startDanglingController(lab: Lab, pod: string, policy: string): Promise<LabProcess> {
  const { ground } = lab;
  const place = { netns: ground.netnsPath('control'), cgroup: ground.subgroup('control') };
  const log = join(ground.directory, 'logs', 'dangling-controller.log');
  const argv = [process.execPath, fileURLToPath(new URL('dangling-controller-main.js', import.meta.url))];
  argv.push(lab.manifests.directory, join(ground.directory, 'data'), `${CONTROL_ADDRESS}:${CONTROLLER_PORT}`);
  const controller = await LabProcess.start('dangling controller', place, [...argv, pod, policy], { log });
  await waitFor('the dangling controller to listen', () => readFileSync(log, 'utf8').includes('"listening"'), {
    hint: () => controller.tail(),
  });
  return controller;
}
