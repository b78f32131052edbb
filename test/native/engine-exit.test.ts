import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

// Threads that still run while the process exits crash it nearly every time if nobody stops them, so that twenty runs
// of each way out tell.
const runs = 20;
const addon = fileURLToPath(new URL('../../native/build/Release/engine.node', import.meta.url));

const prelude = `
const addon = require(${JSON.stringify(addon)});
addon.create({ workers: 2, nodeName: 'n', network: '', clusterId: 'c', streamWindow: 4194304, connectionWindow: 16777216,
  frameSize: 1048576, maxStreamsPerConnection: 100, poolIdleMs: 1000 }, () => {}, () => {}, () => {});
addon.start();
require('node:fs').writeSync(1, 'running');
`;

const ways: Record<string, { readonly body: string; readonly status: number }> = {
  'its natural end': { body: '', status: 0 },
  'process.exit': { body: 'process.exit(3)', status: 3 },
  'process.exit from a timer, with a drain under way': {
    body: 'addon.drain(60000); setTimeout(() => process.exit(4), 5)',
    status: 4,
  },
  'an uncaught exception': { body: "throw new Error('on purpose')", status: 1 },
  'an unhandled rejection': { body: "Promise.reject(new Error('on purpose'))", status: 1 },
  'SIGTERM, handled': {
    body: "process.on('SIGTERM', () => { addon.stopNow(); process.exit(5); }); setInterval(() => {}, 1000); process.kill(process.pid, 'SIGTERM')",
    status: 5,
  },
  'the end of a drain': { body: 'addon.drain(1000).then(() => addon.stopNow())', status: 0 },
  'an exit handler that stops': { body: "process.on('exit', () => addon.stopNow()); process.exit(6)", status: 6 },
};

describe('a process with a running engine', () => {
  for (const [name, way] of Object.entries(ways)) {
    it(`leaves by ${name} ${runs} times without a crash`, () => {
      for (let run = 0; run < runs; run += 1) {
        const child = spawnSync(process.execPath, ['-e', prelude + way.body], { encoding: 'utf8', timeout: 20_000 });
        expect({ status: child.status, signal: child.signal, stdout: child.stdout }, child.stderr).toEqual({
          status: way.status,
          signal: null,
          stdout: 'running',
        });
      }
    });
  }
});
