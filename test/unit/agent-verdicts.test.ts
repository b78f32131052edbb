import { pino } from 'pino';
import { beforeEach, expect, it } from 'vitest';
import type { HeldPod, PodVerdict } from '../../src/agent/capture.ts';
import { Verdicts } from '../../src/agent/verdicts.ts';

let calls: string[];
let before: string[];
let failing: boolean;
let verdicts: Verdicts;

const held = (uid: string) => ({ uid }) as HeldPod;
beforeEach(() => {
  calls = [];
  before = ['old'];
  failing = false;
  verdicts = new Verdicts(
    {
      decide: (uid, verdict) => {
        if (failing) throw new Error('no room');
        calls.push(`${uid} ${verdict}`);
      },
      forget: (uid) => void calls.push(`forget ${uid}`),
      decided: () => before,
      held: () => [held('stray'), held('a')],
    },
    pino({ level: 'silent' }),
  );
});
const apply = (pods: Record<string, PodVerdict | undefined>, complete = true): string[] => {
  verdicts.apply(
    Object.entries(pods).map(([cgroupUid, verdict]) => ({ cgroupUid, verdict })),
    complete,
  );
  return calls.splice(0);
};

it('each pod is decided about once, and again when that changes', () => {
  before = [];
  expect(apply({ a: 'mesh', b: 'plain' }, false)).toEqual(['a mesh', 'b plain']);
  expect(apply({ a: 'mesh', b: 'plain' }, false)).toEqual([]);
  expect(apply({ a: 'plain', b: 'plain' }, false)).toEqual(['a plain']);
});

it('nothing is decided about a pod of which too little is known', () => {
  expect(apply({ a: undefined }, false)).toEqual([]);
  expect(apply({ a: 'mesh' }, false)).toEqual(['a mesh']);
});

it('what an agent before decided, and what came while there was none, is forgotten once the API does not name it', () => {
  expect(apply({ a: 'mesh' }, false)).toEqual(['a mesh']);
  expect(apply({ a: 'mesh' })).toEqual(['forget old', 'forget stray']);
  expect(apply({ a: 'mesh' })).toEqual([]);
  expect(apply({})).toEqual(['forget a']);
});

it('what could not be decided is tried with the next state', () => {
  failing = true;
  expect(apply({ a: 'mesh' }, false)).toEqual([]);
  failing = false;
  expect(apply({ a: 'mesh' }, false)).toEqual(['a mesh']);
});
