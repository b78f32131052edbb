import { Command } from 'commander';

/** `ebbtide proxy`. */
export function proxyCommand(): Command {
  return new Command('proxy');
}
