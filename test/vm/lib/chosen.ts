/** Which kernel a test file is to use: one that is started by hand has the oldest. */
import { KERNELS, type KernelName } from './kernels.ts';

/** @throws Error where EBBTIDE_VM_KERNEL is no name of a kernel */
export function chosenKernel(env: NodeJS.ProcessEnv = process.env): KernelName {
  const asked = env.EBBTIDE_VM_KERNEL || KERNELS[0];
  const found = KERNELS.find((each) => each === asked);
  if (found === undefined) throw new Error(`EBBTIDE_VM_KERNEL is ${asked}; there are ${KERNELS.join(', ')}`);
  return found;
}
