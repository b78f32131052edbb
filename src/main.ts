#!/usr/bin/env node
/** The `ebbtide` command. Each subcommand lives beside what it runs and loads its heavy parts only when it runs. */
import { Command } from 'commander';
import { agentCommand } from './agent/command.js';
import { demoCommand } from './cli/demo.js';
import { uninstallCommand } from './cli/uninstall.js';
import { controllerCommand } from './controller/command.js';
import { proxyCommand } from './proxy/command.js';

const program = new Command('ebbtide').description('A service mesh without sidecars.').version('0.1.0');
program.addCommand(controllerCommand());
program.addCommand(agentCommand());
program.addCommand(proxyCommand());
program.addCommand(demoCommand());
program.addCommand(uninstallCommand());
await program.parseAsync();
