/**
 * Signals under `npx`: npm hands them to a shell that passes nothing on, so that a stopped `npx ebbtide agent` would leave
 * the agent behind. Hence the processes above are watched.
 */
import { readFileSync } from 'node:fs';

const LOOK_MS = 100;

/** Parent and command line of a process; undefined when it has ended. */
function look(pid: number): { readonly parent: number; readonly command: string } | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // "pid (name, which may hold anything) state ppid ..."
    const [state, parent] = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    if (state === 'Z' || state === 'X') return undefined;
    return { parent: Number(parent), command: readFileSync(`/proc/${pid}/cmdline`, 'utf8') };
  } catch {
    return undefined;
  }
}

/**
 * Where npm runs this process, ends it as npm was ended: npm stops its shell when it is told to stop, so a shell that is
 * gone means SIGTERM; npm gone before its shell was killed with -9, and so is this process. Does not keep it alive.
 *
 * SIGINT is another matter: dash waits for its command before it obeys one, and nothing of that is to be seen from here.
 * Hence .npmrc has bash run commands, which becomes the command; npm's signals then reach it without a shell between.
 * @param killed how to end when npm was killed
 */
export function followNpx(killed: 'SIGKILL' | 'SIGTERM', env: NodeJS.ProcessEnv = process.env): void {
  if (!['exec', 'run', 'run-script'].includes(env['npm_command'] ?? '')) return;
  const parent = process.ppid;
  const above = look(parent);
  if (above === undefined) return;
  const isNpm = ({ command }: { readonly command: string }): boolean =>
    /^(npm|npx|[^\0]*node\0[^\0]*np[mx])/.test(command);
  const direct = isNpm(above);
  // Whatever else is between npm and this process has started it for its own ends.
  if (!direct && !/^([^\0]*\/)?(sh|dash|bash)\0/.test(above.command)) return;
  const npm = direct ? parent : above.parent;
  const found = direct ? above : look(npm);
  if (found === undefined || !isNpm(found)) return;
  const timer = setInterval(() => {
    if (process.ppid !== parent) {
      clearInterval(timer);
      process.kill(process.pid, direct ? killed : 'SIGTERM');
    } else if (!direct && look(npm) === undefined) {
      clearInterval(timer);
      process.kill(process.pid, killed);
    }
  }, LOOK_MS);
  timer.unref();
}
