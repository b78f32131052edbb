/** See dangling-controller.ts: the built controller, whose resources are changed on their way out. */
const dist = new URL('../../../dist/', import.meta.url);
const load = (path) => import(new URL(path, dist).href);
const { createLogger } = await load('mesh/log.js');
const { decideEnrolment } = await load('mesh/enrolment.js');
const { istio } = await load('mesh/proto/generated.js');
const { startController } = await load('controller/controller.js');
const { manifestSource } = await load('controller/manifests.js');
const { ResourceBuilder } = await load('controller/resources.js');
const { parseListen } = await load('controller/settings.js');
const { makeResource } = await load('controller/store.js');

const [manifests, data, listen, pod, policy] = process.argv.slice(2);
const { Address } = istio.workload;

const build = ResourceBuilder.prototype.build;
ResourceBuilder.prototype.build = function (objects) {
  const result = build.call(this, objects);
  const addresses = new Map(result.addresses);
  for (const [name, resource] of addresses) {
    const { workload } = Address.decode(resource.value);
    if (workload?.name !== pod) continue;
    workload.authorizationPolicies = [...workload.authorizationPolicies, policy];
    addresses.set(name, makeResource(name, Address.encode({ workload }).finish(), resource.aliases));
  }
  return { ...result, addresses };
};

const log = createLogger('controller');
const settings = { listen: parseListen(listen), ttlSeconds: 86_400 };
const names = { trustDomain: 'cluster.local', clusterDomain: 'cluster.local', clusterId: 'Kubernetes' };
const source = manifestSource(manifests, data, log);
const belongsInMesh = (each, namespace) => decideEnrolment(each, namespace).enrol;
const controller = await startController({ ...settings, ...names }, { source, log, belongsInMesh, data });
process.on('SIGTERM', () => controller.close());
