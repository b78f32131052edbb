import { sweep } from '../../src/lab/ground.ts';

/** Before the datapath tests: removes what labs of crashed runs left. */
export async function setup(): Promise<void> {
  const swept = await sweep();
  if (swept.length > 0) process.stdout.write(`removed leftovers of crashed labs: ${swept.join(', ')}\n`);
}
