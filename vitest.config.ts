import { defineConfig } from 'vitest/config';
import { patient } from './src/lab/wait.ts';

// Unit tests run side by side. Datapath tests share one kernel, its processors and the wire between nodes: one file at a
// time, after the unit tests. Everything is plain `describe/it`; what a test needs it imports.
export default defineConfig({
  test: {
    teardownTimeout: 30_000,
    reporters: ['default', './test/lib/summary-reporter.ts'],
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.ts', 'src/**/*.test.ts'],
          testTimeout: 20_000,
          hookTimeout: 60_000,
          sequence: { groupOrder: 0 },
        },
      },
      {
        test: {
          name: 'native',
          include: ['test/native/**/*.test.ts'],
          testTimeout: 600_000,
          hookTimeout: 600_000,
          fileParallelism: false,
          sequence: { groupOrder: 1 },
        },
      },
      {
        test: {
          name: 'datapath',
          include: ['test/datapath/**/*.test.ts'],
          globalSetup: ['./test/lib/sweep.ts'],
          pool: 'forks',
          testTimeout: patient(60_000),
          hookTimeout: patient(90_000),
          expect: { poll: { timeout: patient(1000) } },
          fileParallelism: false,
          sequence: { groupOrder: 2 },
        },
      },
      {
        test: {
          name: 'kubernetes',
          include: ['test/kubernetes/{api,agent}-*.test.ts'],
          pool: 'forks',
          testTimeout: 120_000,
          hookTimeout: 900_000,
          fileParallelism: false,
          sequence: { groupOrder: 3 },
        },
      },
      {
        test: {
          name: 'cluster',
          include: ['test/kubernetes/cluster-*.test.ts'],
          globalSetup: ['./test/lib/sweep.ts'],
          pool: 'forks',
          testTimeout: 120_000,
          hookTimeout: 600_000,
          fileParallelism: false,
          sequence: { groupOrder: 4 },
        },
      },
      {
        test: {
          name: 'vm',
          include: ['test/vm/**/*.test.ts'],
          pool: 'forks',
          testTimeout: 300_000,
          hookTimeout: 600_000,
          fileParallelism: false,
          sequence: { groupOrder: 5 },
        },
      },
    ],
  },
});
