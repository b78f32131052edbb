/** `ebbtide demo`: the whole mesh on this machine, shown step by step. */
import { Command } from 'commander';

/** `ebbtide demo`. */
export function demoCommand(): Command {
  return new Command('demo')
    .description('run two nodes with pods on this machine and show what the mesh does (needs root)')
    .option('--keep', 'stay up afterwards and print how to look around, until ^C', false)
    .action(async (options: { readonly keep: boolean }) => {
      const { runDemo } = await import('./demo/run.js');
      // Steps that were interrupted may still wait for what will not come.
      process.exit(await runDemo(options));
    });
}
