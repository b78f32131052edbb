import { Command } from 'commander';

/** `ebbtide uninstall`. */
export function uninstallCommand(): Command {
  return new Command('uninstall');
}
