/**
 * `npm run cluster [-- --mesh]`: brings the test cluster up, with Ebbtide installed on it where asked, says how to use it,
 * and takes it down at ^C.
 */
import { Cluster } from './lib/cluster.ts';
import { installMesh } from './lib/mesh.ts';
import { say } from './lib/report.ts';

const cluster = await Cluster.create(say);
try {
  if (process.argv.includes('--mesh')) await installMesh(cluster, say);
  say('the cluster is up');
  process.stdout.write(`kubectl: ${cluster.plane.kubectlCommand.join(' ')} get pods -A\n^C ends it.\n`);
  await new Promise((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, resolve);
    setInterval(() => {}, 1 << 30);
  });
} finally {
  say('taking it down');
  await cluster.close();
}
process.exit(0);
