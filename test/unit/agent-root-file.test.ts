import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { AWAITED_ANNOTATION, RootFile } from '../../src/agent/root-file.ts';
import { ApiError } from '../../src/mesh/api/index.ts';
import { FakeApi } from '../lib/fake-api.ts';

const turn = () => new Promise((resolve) => setImmediate(resolve));

describe("the file of the mesh's root certificates", () => {
  let directory: string;
  let path: string;
  let fake: FakeApi;
  let now: number;
  let file: RootFile;
  const pod = { name: 'ebbtide-node-x', namespace: 'mesh', uid: 'u' };
  const values = () =>
    fake.asked.map(({ body }) => (body as { metadata: { annotations: Record<string, unknown> } }).metadata.annotations);
  /** Looks once a second, as the agent does. */
  async function pass(seconds: number): Promise<void> {
    for (let i = 0; i < seconds; i++) {
      now += 1000;
      file.look();
      await turn();
    }
  }

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'ebbtide-root-'));
    path = join(directory, 'root-cert.pem');
    fake = new FakeApi();
    now = 0;
    file = new RootFile({ api: fake.api, pod, path, log: pino({ level: 'silent' }), now: () => now });
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  it('that is there, or comes by itself in time, is nothing to talk about', async () => {
    await pass(1);
    writeFileSync(path, 'x');
    await pass(100);
    expect(fake.asked).toEqual([]);
  });

  it('that is missing has the pod changed again and again, each time in another way, until it is there', async () => {
    await pass(12);
    expect(fake.asked.map(({ method, path: asked }) => `${method} ${asked}`)).toEqual(
      Array(4).fill('PATCH /api/v1/namespaces/mesh/pods/ebbtide-node-x/status'),
    );
    expect(fake.asked[0]?.body).toMatchObject({ metadata: { uid: 'u' } });
    expect(new Set(values().map((each) => each[AWAITED_ANNOTATION])).size).toBe(4);
    writeFileSync(path, 'x');
    await pass(1);
    expect(values().at(-1)).toEqual({ [AWAITED_ANNOTATION]: null });
    await pass(100);
    expect(fake.asked).toHaveLength(5);
  });

  it('that is missing for long is asked for rarely, also where the API refuses, and after some minutes no more', async () => {
    fake.failure = new ApiError(403, 'Forbidden', 'no');
    await pass(300);
    const asked = fake.asked.length;
    expect(asked).toBeGreaterThan(10);
    expect(asked).toBeLessThan(20);
    await pass(300);
    expect(fake.asked).toHaveLength(asked);
  });
});
