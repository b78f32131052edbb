/** `node --import ./test/lib/typescript.ts test/kubernetes/up.ts`: brings the test cluster up, says how to use it, and takes it down at ^C. */
import { Cluster } from './lib/cluster.ts';
import { say } from './lib/report.ts';

const cluster = await Cluster.create(say);
say('the cluster is up');
const control = cluster.ground.netnsPath('control');
process.stdout.write(
  `kubectl: nsenter --net=${control} kubectl --kubeconfig=${cluster.plane.kubeconfig('admin')} get pods -A\n^C ends it.\n`,
);
await new Promise((resolve) => {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, resolve);
  setInterval(() => {}, 1 << 30);
});
say('taking it down');
await cluster.close();
process.exit(0);
