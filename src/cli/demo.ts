import { Command } from 'commander';

/** `ebbtide demo`. */
export function demoCommand(): Command {
  return new Command('demo');
}
