#!/usr/bin/env node
/** The `ebbtide` command. Each subcommand lives beside what it runs and loads its heavy parts only when it runs. */

// Checked before anything else is loaded: the native engine uses the TLS library of the very Node it was built for.
const major = Number(process.versions.node.split('.')[0]);
if (major < 24) {
  process.stderr.write(
    `ebbtide needs Node 24 or newer, this is ${process.version} (${process.execPath}).\n` +
      'In a checkout run it by `npx ebbtide` or put node_modules/.bin first on PATH: the right Node is installed there.\n',
  );
  process.exit(1);
}

const { Command } = await import('commander');
const { agentCommand } = await import('./agent/command.js');
const { checkCommand } = await import('./cli/check.js');
const { bootGuardCommand } = await import('./cli/boot-guard.js');
const { demoCommand } = await import('./cli/demo.js');
const { statusCommand } = await import('./cli/status.js');
const { uninstallCommand } = await import('./cli/uninstall.js');
const { controllerCommand } = await import('./controller/command.js');
const { proxyCommand } = await import('./proxy/command.js');
const { followNpx } = await import('./mesh/npx.js');

// A demo without its terminal still takes away what it made.
followNpx(process.argv[2] === 'demo' ? 'SIGTERM' : 'SIGKILL');

const program = new Command('ebbtide').description('A service mesh without sidecars.').version('0.1.0');
program.addCommand(controllerCommand());
program.addCommand(agentCommand());
program.addCommand(proxyCommand());
program.addCommand(demoCommand());
program.addCommand(checkCommand());
program.addCommand(statusCommand());
program.addCommand(uninstallCommand());
program.addCommand(bootGuardCommand());
await program.parseAsync();
