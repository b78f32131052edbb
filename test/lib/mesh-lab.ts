/** Labs as the mesh tests use them: made, waited for, and told apart as captured or plain. */
import { Lab, type MeshOptions, type Metric, type Pod, sumMetrics, waitFor } from '../../src/lab/index.ts';
import { clientArgv, PORT, startServer } from './peers.ts';

/** What the proxies of both nodes have counted. */
export async function metricsOf(lab: Lab): Promise<Metric[]> {
  return (await Promise.all(lab.nodes.map((node) => node.metrics()))).flat();
}

export type Reporter = 'source' | 'destination';

/** Opened connections by reporter and security policy, of both nodes together. */
export function opened(metrics: readonly Metric[], reporter: Reporter, policy: 'mutual_tls' | 'unknown'): number {
  return sumMetrics(metrics, 'istio_tcp_connections_opened_total', { reporter, connection_security_policy: policy });
}

/** Resolves when a connection between two captured pods is carried with mutual TLS. */
export async function captured(lab: Lab, client: Pod, server: Pod): Promise<void> {
  await waitFor(
    `${client.id} to reach ${server.id} with mutual TLS`,
    async () => {
      const before = opened(await lab.node(server.node).metrics(), 'destination', 'mutual_tls');
      const probe = await client.run(clientArgv('whoami', server.addresses.v4, PORT.whoami), { timeoutMs: 5000 });
      if (probe.code !== 0) throw new Error(probe.stderr.trim().split('\n').at(-1));
      return opened(await lab.node(server.node).metrics(), 'destination', 'mutual_tls') > before;
    },
    { timeoutMs: 30_000, intervalMs: 200, hint: () => processes(lab) },
  );
}

/** The last lines of the mesh's logs, for an error message. */
export function processes(lab: Lab): string {
  return [lab.controller, ...lab.nodes.flatMap((node) => [node.agent, node.proxy])]
    .filter((process) => process !== undefined)
    .map((process) => `--- ${process.name} (${process.fate})\n${process.tail(8)}`)
    .join('\n');
}

/** Makes a lab, fills it, and removes it again if that fails. */
export async function labWith<T extends object>(fill: (lab: Lab) => Promise<T>): Promise<T & { readonly lab: Lab }> {
  const lab = await Lab.create();
  try {
    return { ...(await fill(lab)), lab };
  } catch (error) {
    await lab.close();
    throw error;
  }
}

/** The smallest mesh: a client on one node, a server on the other, captured both. */
export async function pairLab(lab: Lab, options: MeshOptions = {}): Promise<{ near: Pod; server: Pod }> {
  lab.namespace('meshed', { mesh: true });
  const near = await lab.pod({ name: 'client', namespace: 'meshed', node: 1 });
  const server = await lab.pod({ name: 'server', namespace: 'meshed', node: 2 });
  await startServer(server);
  await lab.startMesh(options);
  await captured(lab, near, server);
  return { near, server };
}
