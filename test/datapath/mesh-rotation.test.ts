/** Certificates that live half a minute rotate under load. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Lab, type Pod, sumMetrics } from '../../src/lab/index.ts';
import { labWith, pairLab } from '../lib/mesh-lab.ts';
import { Background, PORT } from '../lib/peers.ts';

const LIFETIME_SECONDS = 30;
const LOAD_SECONDS = 75;

const rotationLab = (lab: Lab) =>
  pairLab(lab, {
    controllerArguments: ['--ttl', `${LIFETIME_SECONDS}s`],
    proxyEnv: { SECRET_TTL: `${LIFETIME_SECONDS}s` },
  });

describe('rotation', () => {
  let made: { near: Pod; server: Pod; lab: Lab };
  beforeAll(async () => {
    made = await labWith(rotationLab);
  });
  afterAll(() => made?.lab.close());

  it(
    `certificates of ${LIFETIME_SECONDS} s rotate for ${LOAD_SECONDS} s with no failed connection`,
    async () => {
      const { lab, near, server } = made;
      const before = await serials(lab);
      const load = await Background.start(near, 'load', server.addresses.v4, PORT.echo, LOAD_SECONDS);
      const said = await load.result();
      expect(said).toMatchObject({ failures: {}, long_lived: true });
      expect(said.done).toBeGreaterThan(1000);
      // The certificates in use at the end are not those of the start, which have expired meanwhile.
      const after = await serials(lab);
      expect(after.length).toBeGreaterThan(0);
      expect(after.filter((serial) => before.includes(serial))).toEqual([]);
      const failed = sumMetrics(await lab.node(1).metrics(), 'istio_tcp_connections_failed_total', {});
      expect(failed).toBe(0);
    },
    (LOAD_SECONDS + 30) * 1000,
  );
});

/** Serial numbers of the workload certificates that the proxies hold, from their config dumps (ztunnel's shape). */
async function serials(lab: Lab): Promise<string[]> {
  const dumps = await Promise.all(lab.nodes.map((node) => node.configDump()));
  return dumps.flatMap((dump) =>
    ((dump.certificates ?? []) as { certChain?: { serialNumber?: string }[] }[]).flatMap(({ certChain }) =>
      certChain?.[0]?.serialNumber === undefined ? [] : [certChain[0].serialNumber],
    ),
  );
}
