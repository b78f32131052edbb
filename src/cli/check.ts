/** `ebbtide check`: whether this node can run the mesh, found out by trying; each finding has a code and says what to do. */
import { resolve } from 'node:path';
import { Command, Option } from 'commander';
import { DEFAULT_BPFFS } from '../agent/mounts.js';
import type { Finding } from './check/finding.js';

/** It can run, warnings or not. */
const CAN_RUN = 0;
const FAILED = 1;
const CANNOT_CHECK = 2;

export interface CheckOptions {
  readonly cgroup?: string;
  readonly bpffs: string;
  readonly hostNetns?: string;
  readonly kubeconfig?: string;
  readonly output: 'table' | 'json';
}

/** `ebbtide check`: exit code 0 it can run, 1 something failed, 2 it cannot be checked. */
export function checkCommand(): Command {
  return new Command('check')
    .description('Try whether this node can run the mesh; changes nothing.')
    .option('--cgroup <dir>', 'directory of cgroup2 that would be captured (default: the root of cgroup2)')
    .option('--bpffs <dir>', "the agent's bpffs", DEFAULT_BPFFS)
    .addOption(
      new Option('--host-netns <path>', "the node's network namespace (default: that of process 1)").env(
        'EBBTIDE_HOST_NETNS',
      ),
    )
    .addOption(
      new Option('--kubeconfig <file>', "how to reach the Kubernetes API (default: by the pod's service account)").env(
        'EBBTIDE_KUBECONFIG',
      ),
    )
    .addOption(new Option('--output <format>', 'what is printed').choices(['table', 'json']).default('table'))
    .addHelpText(
      'after',
      '\nEnvironment:\n  XDS_ADDRESS, XDS_ROOT_CA, ALT_XDS_HOSTNAME  the controller, as the proxy has them; without XDS_ADDRESS none is asked' +
        '\n\nExit code: 0 it can run (there may be warnings), 1 something failed, 2 it cannot be checked (not root, ...)',
    )
    .action(async (options: CheckOptions) => {
      process.exitCode = await check(options);
    });
}

async function check(options: CheckOptions): Promise<number> {
  if (process.geteuid?.() !== 0) {
    process.stderr.write(
      `ebbtide check must run as root, this is user ${process.geteuid?.()}: run it by sudo, or in the agent's container ` +
        '(kubectl exec -n ebbtide-system daemonset/ebbtide-node -c agent -- node dist/main.js check)\n',
    );
    return CANNOT_CHECK;
  }
  let findings: Finding[];
  try {
    const { findAll } = await import('./check/run.js');
    findings = await findAll({
      ...options,
      bpffs: resolve(options.bpffs),
      ...(options.cgroup ? { cgroup: resolve(options.cgroup) } : {}),
    });
  } catch (error) {
    process.stderr.write(`ebbtide check: ${(error as Error).message}\n`);
    return CANNOT_CHECK;
  }
  process.stdout.write(options.output === 'json' ? `${JSON.stringify(findings, null, 2)}\n` : tableOf(findings));
  return findings.some(({ result }) => result === 'failed') ? FAILED : CAN_RUN;
}

/** A line a finding, then how many there are of each result. */
export function tableOf(findings: readonly Finding[]): string {
  const width = Math.max(...findings.map(({ code }) => code.length));
  const lines = findings.map(
    ({ code, result, seen, hint }) =>
      `${code.padEnd(width)}  ${result.padEnd('not tried'.length)}  ${seen}${hint === '' ? '' : ` -> ${hint}`}`,
  );
  const count = (of: Finding['result']): number => findings.filter(({ result }) => result === of).length;
  const sums = (['ok', 'warning', 'failed', 'not tried'] as const).map((result) => `${count(result)} ${result}`);
  return `${[...lines, sums.join(', ')].join('\n')}\n`;
}
