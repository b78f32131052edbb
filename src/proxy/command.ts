/** `ebbtide proxy`. */
import { Command } from 'commander';
import { describeVariables } from './variables.js';

const DESCRIPTION = `The proxy of a node: carries the connections of its pods over mutual TLS, and refuses those that policy does not allow.

It is told by its environment alone, whose names are ztunnel's. It stops by SIGTERM or SIGINT after open connections had their time to end, at once by a second signal. HTTP: /healthz/ready on 15021, /metrics on 15020, and on 127.0.0.1:15000 /config_dump, /logging?level=LEVEL (POST) and /quitquitquit (POST).`;

/** Declares the command. What it runs is loaded when it runs. */
export function proxyCommand(): Command {
  return new Command('proxy')
    .description(DESCRIPTION)
    .summary('carry the connections of the pods of a node')
    .addHelpText('after', describeVariables())
    .action(async () => {
      const { runProxy } = await import('./run.js');
      await runProxy(process.env);
    });
}
