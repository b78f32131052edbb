import { openSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Engine } from '../../../src/proxy/engine.js';
import { checkOpenssl, createEngine, explainLoadFailure, trafficLabelNames } from '../../../src/proxy/native-engine.js';
import { delta, options, workload } from './options.ts';

const quiet = { onAccess: () => {}, onCertificateNeeded: () => {}, onFault: () => {} };

/** Neither of the right type anywhere nor harmless: what an argument, or a field of one, is replaced by. */
const garbage: readonly unknown[] = [
  null,
  undefined,
  Number.NaN,
  -1,
  1.5,
  2 ** 40,
  'text',
  '\u0000',
  Symbol('s'),
  10n,
  [],
  [null],
  {},
  () => {},
  new Float64Array(4),
  new Uint8Array(3),
  new Date(),
  new Proxy(
    {},
    {
      get() {
        throw new Error('trap');
      },
    },
  ),
];

/** All copies of `value` in which one field or element, at any depth, is replaced by each of `garbage`. */
function* spoiled(value: unknown): Generator<unknown> {
  yield* garbage;
  if (Array.isArray(value)) {
    for (const [index, element] of value.entries()) {
      for (const bad of spoiled(element)) yield value.with(index, bad);
    }
  } else if (typeof value === 'object' && value !== null && !ArrayBuffer.isView(value)) {
    for (const [key, field] of Object.entries(value)) {
      for (const bad of spoiled(field)) yield { ...value, [key]: bad };
    }
  }
}

describe('the binding of the engine', () => {
  let engine: Engine;
  beforeEach(() => {
    engine = createEngine(options, quiet);
    engine.start();
  });
  afterEach(() => engine.stopNow());

  it('takes a delta of every kind of value, and counts nothing without traffic', () => {
    engine.apply(delta);
    expect(engine.traffic()).toEqual([]);
    expect(engine.connections()).toEqual([]);
    expect(engine.stats()).toEqual({
      openConnections: 0,
      hboneConnections: 0,
      handshakes: 0,
      handshakeFailures: 0,
      bufferedBytes: 0,
      accessRecordsDropped: 0,
      faults: 0,
    });
    expect(trafficLabelNames()).toHaveLength(27);
  });

  it('throws an Error with a message, or accepts, whatever one field of a delta is', () => {
    let thrown = 0;
    let taken = 0;
    for (const bad of spoiled(delta)) {
      try {
        engine.apply(bad as typeof delta);
        taken += 1;
      } catch (error) {
        expect(error).toBeInstanceOf(Error);
        expect((error as Error).message).not.toBe('');
        thrown += 1;
      }
    }
    // Some replacements are right: a text for a text, an empty list for a list.
    expect(thrown).toBeGreaterThan(1000);
    expect(taken).toBeGreaterThan(10);
    engine.apply(delta);
  });

  it('names the place of a wrong value', () => {
    const wrong = { ...delta, workloads: [workload, { ...workload, addresses: [Uint8Array.of(1, 2, 3)] }] };
    expect(() => engine.apply(wrong)).toThrow(new TypeError('delta.workloads[1].addresses[0]: expected 4 or 16 bytes'));
    const port = {
      ...delta,
      workloads: [{ ...workload, services: [{ key: 'a/b', ports: [{ servicePort: 70000, targetPort: 1 }] }] }],
    };
    expect(() => engine.apply(port)).toThrow(
      /^delta\.workloads\[0\]\.services\[0\]\.ports\[0\]\.servicePort: .*65535$/,
    );
  });

  it('refuses wrong arguments of every other function', () => {
    const certificate = { chainPem: 'x', keyPem: 'y', rootsPem: 'z' };
    const identity = 'spiffe://cluster.local/ns/a/sa/b';
    for (const bad of garbage) {
      expect(() => engine.addPod(bad as never)).toThrow(Error);
      expect(() => engine.setCertificate(bad as never, certificate)).toThrow(Error);
      expect(() => engine.setCertificate(identity, bad as never)).toThrow(Error);
      if (typeof bad !== 'string') {
        expect(() => engine.removePod(bad as never)).toThrow(TypeError);
        expect(() => engine.removeCertificate(bad as never)).toThrow(TypeError);
      }
      expect(() => engine.drain(bad as never)).toThrow(Error);
    }
    expect(() => engine.setCertificate(identity, certificate)).toThrow(/engine: /);
    for (const bad of spoiled(options)) {
      expect(() => createEngine(bad as never, quiet)).toThrow(Error);
    }
  });

  it('refuses a descriptor that is no network namespace, and says so', () => {
    const pod = { uid: 'u', name: 'n', namespace: 'a', serviceAccount: 'b', netnsFd: openSync('/dev/null', 'r') };
    expect(() => engine.addPod(pod)).toThrow(/^engine: .*network namespace/);
    engine.removePod('u');
    engine.removePod('never seen');
  });

  it('is one of a process, and can be made again after it stopped', async () => {
    expect(() => createEngine(options, quiet)).toThrow(/stop it first/);
    await engine.drain(100);
    engine.stopNow();
    engine.stopNow();
    expect(() => engine.apply(delta)).toThrow(/stopped/);
    expect(engine.traffic()).toEqual([]);
    engine = createEngine(options, quiet);
    engine.start();
    engine.apply(delta);
  });

  it('settles a drain that stopNow overtakes', async () => {
    const drained = Promise.all([engine.drain(60_000), engine.drain(60_000)]);
    engine.stopNow();
    await drained;
  });
});

describe('loading the engine', () => {
  it('compares OpenSSL by major and minor version', () => {
    checkOpenssl('3.5', '3.5', '3.5.8');
    expect(() => checkOpenssl('3.0', '3.5', '3.5.8')).toThrow(/compiled for OpenSSL 3.0.*npm run build:native/);
    expect(() => checkOpenssl('3.5', '3.0', '3.5.8')).toThrow(/OpenSSL 3.0 is loaded/);
  });

  it('says which symbol this Node lacks', () => {
    const error = explainLoadFailure(new Error('engine.node: undefined symbol: nghttp2_session_mem_send'));
    expect(error.message).toMatch(/does not export nghttp2_session_mem_send/);
    expect(explainLoadFailure(new Error('no such file')).message).toMatch(/npm run build:native/);
  });
});
