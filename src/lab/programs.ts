/** Real programs as pods run them: nginx, redis, sshd. */
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { must } from './exec.js';
import type { Pod } from './lab.js';
import type { LabProcess } from './process.js';

/** nginx that answers every request with this text, and logs who asked. Resolves when it listens. */
export async function startNginx(pod: Pod, body: string, port = 80): Promise<LabProcess> {
  const file = join(pod.directory, 'nginx.conf');
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    (name) => `  ${name}_temp_path ${pod.directory}/tmp;`,
  );
  writeFileSync(
    file,
    `user root;
worker_processes 1;
daemon off;
pid ${pod.directory}/nginx.pid;
error_log stderr;
events { worker_connections 4096; }
http {
${temporary.join('\n')}
  access_log ${accessLogFile(pod)};
  server {
    listen ${port};
    listen [::]:${port};
    location / { default_type text/plain; return 200 "${body}\\n"; }
  }
}
`,
  );
  const process = await pod.start('nginx', ['nginx', '-e', 'stderr', '-c', file]);
  await pod.listening(port, process);
  return process;
}

function accessLogFile(pod: Pod): string {
  return join(pod.directory, 'access.log');
}

/** The client addresses in an nginx's access log, oldest first. */
export function nginxClients(pod: Pod): string[] {
  if (!existsSync(accessLogFile(pod))) return [];
  return readFileSync(accessLogFile(pod), 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => line.split(' ')[0] ?? '');
}

/** Redis without persistence on its usual port. Resolves when it listens. */
export async function startRedis(pod: Pod): Promise<LabProcess> {
  const argv = ['redis-server', '--port', '6379', '--save', '', '--appendonly', 'no', '--protected-mode', 'no'];
  const process = await pod.start('redis', [...argv, '--dir', pod.directory]);
  await pod.listening(6379, process);
  return process;
}

/** Where sshd wants an empty directory of root's. */
const PRIVILEGE_SEPARATION_DIRECTORY = '/run/sshd';

/** An OpenSSH server, which speaks first, with a host key of its own. Resolves when it listens. */
export async function startSshd(pod: Pod): Promise<LabProcess> {
  const key = join(pod.directory, 'host_key');
  await must(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key]);
  const file = join(pod.directory, 'sshd_config');
  writeFileSync(file, `Port 22\nHostKey ${key}\nPidFile none\nUsePAM no\nPasswordAuthentication no\n`);
  const made = !existsSync(PRIVILEGE_SEPARATION_DIRECTORY);
  if (made) mkdirSync(PRIVILEGE_SEPARATION_DIRECTORY, { mode: 0o755 });
  const process = await pod.start('sshd', ['/usr/sbin/sshd', '-D', '-e', '-f', file]);
  // Each connection's process looks at it as well, so it stays as long as the server.
  if (made)
    void process
      .ended()
      .then(() => existsSync(PRIVILEGE_SEPARATION_DIRECTORY) && rmdirSync(PRIVILEGE_SEPARATION_DIRECTORY));
  await pod.listening(22, process);
  return process;
}
