/** When the controller has V8 collect, and that V8 does. */
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { Collector } from '../../src/controller/heap.ts';

test('collects once after things are quiet, and not again before the pause is over', async () => {
  const times: number[] = [];
  const collector = new Collector(() => times.push(performance.now()), 50, 600);
  const begun = performance.now();
  for (let index = 0; index < 5; index++) {
    collector.later();
    await sleep(20);
  }
  expect(times).toHaveLength(0);
  await sleep(200);
  expect(times).toHaveLength(1);
  expect((times[0] ?? 0) - begun).toBeGreaterThanOrEqual(120);
  collector.later();
  await sleep(200);
  expect(times).toHaveLength(1);
  await expect.poll(() => times.length, { timeout: 10_000 }).toBe(2);
  expect((times[1] ?? 0) - (times[0] ?? 0)).toBeGreaterThanOrEqual(590);
});

test('what was let go is given back without another allocation', async () => {
  const collector = new Collector(undefined, 10, 0);
  let large: Buffer | undefined = Buffer.alloc(64 << 20, 1);
  // Old enough that a collection of young objects would not find it.
  new Collector(undefined, 0, 0).later();
  await sleep(100);
  const held = process.memoryUsage().arrayBuffers;
  expect(held).toBeGreaterThanOrEqual(large.length);
  large = undefined;
  collector.later();
  await expect.poll(() => process.memoryUsage().arrayBuffers, { timeout: 10_000 }).toBeLessThan(held - (60 << 20));
});
