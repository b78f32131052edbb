import { Command } from 'commander';

/** `ebbtide agent`. */
export function agentCommand(): Command {
  return new Command('agent');
}
