import { Command } from 'commander';

/** `ebbtide controller`. */
export function controllerCommand(): Command {
  return new Command('controller');
}
