import { appendFileSync, mkdirSync, mkdtempSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { stringify } from 'yaml';
import { derivedUid, type ObjectSet, type Pod } from '../../src/mesh/kubernetes.ts';
import { parseManifest } from '../../src/mesh/manifest-file.ts';
import { type ManifestProblem, ManifestSource } from '../../src/mesh/manifests.ts';

const namespace = (name: string, label = 'ambient') =>
  `apiVersion: v1\nkind: Namespace\nmetadata:\n  name: ${name}\n  labels:\n    istio.io/dataplane-mode: ${label}\n`;

/** Objects by key of a text that must be good. */
function objectsOf(text: string): string[] {
  const parsed = parseManifest(text);
  if (!parsed.ok) throw new Error(JSON.stringify(parsed.problems));
  return parsed.objects.map(({ key }) => key);
}

function problemOf(text: string) {
  const parsed = parseManifest(text);
  if (parsed.ok) throw new Error('taken for good');
  return parsed.problems[0];
}

describe('the text of a manifest', () => {
  it('holds several documents, lists, JSON, and kinds that are none of ours', () => {
    const text = [
      namespace('a'),
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'List',
        items: [
          { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'p', namespace: 'a' } },
          { apiVersion: 'discovery.k8s.io/v1', kind: 'EndpointSlice', metadata: { name: 's' } },
        ],
      }),
      '# nothing here\n',
      'apiVersion: apps/v1\nkind: Deployment\nmetadata: 12\n',
      'apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: UPPER}\n',
      'apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: a}\n',
    ].join('\n---\n');
    expect(objectsOf(text)).toEqual([
      'Namespace a',
      'Pod a/p',
      'EndpointSlice default/s',
      'PeerAuthentication a/default',
    ]);
  });

  it('gives a pod without a uid one of its own, always the same', () => {
    const parsed = parseManifest('apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\n');
    const pod = (parsed.ok ? parsed.objects[0]?.object : undefined) as Pod | undefined;
    const uid = pod?.metadata.uid;
    expect(uid).toBe(derivedUid('a', 'p'));
    expect(uid).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
    expect(derivedUid('a', 'q')).not.toBe(uid);
  });

  it('treats null as absent, as the API server does', () => {
    expect(objectsOf('apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels:\nspec:\nstatus:\n')).toEqual([
      'Pod default/p',
    ]);
  });

  const bad: readonly (readonly [string, string, number, RegExp])[] = [
    ['syntax', 'apiVersion: v1\nkind: [Pod\n', 3, /flow/i],
    ['duplicate field', 'apiVersion: v1\nkind: Pod\nkind: Pod\n', 3, /unique/i],
    ['no name', 'apiVersion: v1\nkind: Pod\nmetadata:\n  namespace: a\n', 4, /metadata has no name/],
    ['label that is a list', `${namespace('a')}    n: [12]\n`, 7, /must be a string, is a list; put it in quotes/],
    [
      'port',
      'apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports:\n  - port: 70000\n',
      6,
      /ports\[0\]\.port/,
    ],
    [
      'address',
      'apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus:\n  podIP: 10.0.0.300\n',
      5,
      /must be an IP address/,
    ],
    ['path in a name', 'apiVersion: v1\nkind: Node\nmetadata:\n  name: ../x\n', 4, /name of lower case/],
    ['path in a uid', 'apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  uid: a/b\n', 5, /UID/],
    [
      'identity in a service account',
      'apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  serviceAccountName: a/sa/b\n',
      5,
      /serviceAccountName/,
    ],
    [
      'empty rule',
      'apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  rules:\n  -\n',
      6,
      /null/,
    ],
    ['no mapping', '- 1\n- 2\n', 1, /not a mapping/],
    [
      'item of a list',
      'apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: 3\n',
      6,
      /must be a mapping/,
    ],
    ['twice in one file', `${namespace('a')}---\n${namespace('a', 'none')}`, 8, /already, on line 1.*not the same/],
    ['unknown alias', 'a: *nothing\n', 1, /alias/i],
  ];
  for (const [name, text, line, message] of bad) {
    it(`reports with its place: ${name}`, () => {
      const problem = problemOf(text);
      expect(problem.message).toMatch(message);
      if (name !== 'unknown alias') expect(problem.line).toBe(line);
    });
  }

  it('takes what is not quoted as it was written, and says so', () => {
    const text = [
      'apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels: {version: 1.10, on: true, n: 010}',
      'apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  rules:\n  - to:\n    - operation:\n        ports: [80]',
      'apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: "80", targetPort: 8080}]}',
    ].join('\n---\n');
    const parsed = parseManifest(text);
    if (!parsed.ok) throw new Error(JSON.stringify(parsed.problems));
    const [pod, policy, service] = parsed.objects.map(({ object }) => object as unknown as Record<string, never>);
    expect(pod).toMatchObject({ metadata: { labels: { version: '1.10', on: 'true', n: '010' } } });
    expect(policy).toMatchObject({ spec: { rules: [{ to: [{ operation: { ports: ['80'] } }] }] } });
    expect(service).toMatchObject({ spec: { ports: [{ port: 80, targetPort: 8080 }] } });
    expect(parsed.warnings).toHaveLength(5);
    expect(parsed.warnings[0]).toMatchObject({
      line: 5,
      message: expect.stringMatching(/quotes; it is taken for "1.10"/),
    });
  });

  it('warns of what protects nothing because of its group', () => {
    const parsed = parseManifest(
      'apiVersion: v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\n',
    );
    expect(parsed.ok && parsed.warnings).toMatchObject([
      { line: 1, message: expect.stringMatching(/no effect; ours is security.istio.io\/AuthorizationPolicy/) },
      { line: 5, message: expect.stringMatching(/RequestAuthentication is not supported/) },
    ]);
  });

  it('takes the same object twice for one', () => {
    expect(objectsOf(`${namespace('a')}---\n${namespace('a')}`)).toEqual(['Namespace a']);
  });

  it('refuses a bomb of aliases', () => {
    const lines = ['a0: &a0 [x,x,x,x,x,x,x,x,x,x]'];
    for (let n = 1; n < 12; n++)
      lines.push(
        `a${n}: &a${n} [${Array(10)
          .fill(`*a${n - 1}`)
          .join(',')}]`,
      );
    expect(problemOf(lines.join('\n')).message).toMatch(/alias/i);
  });

  it('never throws and never takes half a file, whatever is cut or damaged', () => {
    const good = `${namespace('a')}---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, labels: {x: "1"}}\nstatus:\n  podIPs: [{ip: 10.0.0.1}]\n`;
    const damage = fc.array(fc.tuple(fc.nat(good.length), fc.nat(4), fc.string({ maxLength: 5 })), { maxLength: 4 });
    fc.assert(
      fc.property(damage, fc.nat(good.length), (edits, end) => {
        let text = good.slice(0, end);
        for (const [at, length, insert] of edits) text = text.slice(0, at) + insert + text.slice(at + length);
        const parsed = parseManifest(text);
        if (parsed.ok) {
          for (const { object, line } of parsed.objects) {
            expect(typeof object.metadata.name).toBe('string');
            expect(line).toBeGreaterThan(0);
          }
        } else for (const { message } of parsed.problems) expect(message).not.toBe('');
      }),
      { numRuns: 500 },
    );
  });

  it('never throws on any text at all', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 200 }), (text) => {
        parseManifest(text);
      }),
      { numRuns: 500 },
    );
  });
});

describe('a folder of manifests', () => {
  let directory: string;
  let source: ManifestSource;
  let states: ObjectSet[];
  let problems: ManifestProblem[];

  const names = (): string[] => (states.at(-1)?.namespaces ?? []).map(({ metadata }) => metadata.name);
  const put = (file: string, text: string): void => writeFileSync(join(directory, file), text);
  const eventually = (check: () => void, timeout = 5000) => vi.waitFor(check, { timeout, interval: 10 });
  const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
  const start = (remembered?: ReadonlyMap<string, string>): void => {
    const listener = {
      onChange: (objects: ObjectSet) => states.push(objects),
      onProblem: (problem: ManifestProblem) => problems.push(problem),
    };
    source = new ManifestSource(directory, pino({ level: 'silent' }), listener, remembered);
    source.start();
  };

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'ebbtide-manifests-'));
    states = [];
    problems = [];
  });
  afterEach(() => {
    source?.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  it('tells the first state before start returns, also an empty one', () => {
    put('a.yaml', namespace('a'));
    put('.hidden.yaml', namespace('hidden'));
    put('notes.txt', 'nothing');
    mkdirSync(join(directory, 'sub'));
    put('sub/b.json', JSON.stringify({ apiVersion: 'v1', kind: 'Namespace', metadata: { name: 'b' } }));
    start();
    expect(states).toHaveLength(1);
    expect(names()).toEqual(['a', 'b']);
  });

  it('refuses to start on a folder that is not there', () => {
    source = new ManifestSource(join(directory, 'nowhere'), pino({ level: 'silent' }), { onChange: () => {} });
    expect(() => source.start()).toThrow(/ENOENT.*--manifests/);
  });

  it('follows new files, rewritten files, renamed files and removed files', async () => {
    start();
    put('a.yaml', namespace('a'));
    await eventually(() => expect(names()).toEqual(['a']));
    put('a.yaml', namespace('a2'));
    await eventually(() => expect(names()).toEqual(['a2']));
    put('.staged', namespace('b'));
    renameSync(join(directory, '.staged'), join(directory, 'b.yaml'));
    await eventually(() => expect(names()).toEqual(['a2', 'b']));
    renameSync(join(directory, 'b.yaml'), join(directory, 'c.yaml'));
    rmSync(join(directory, 'a.yaml'));
    await eventually(() => expect(names()).toEqual(['b']));
    expect(problems).toEqual([]);
    expect(states.slice(3).every(({ namespaces }) => namespaces.some(({ metadata }) => metadata.name === 'b'))).toBe(
      true,
    );
  });

  it('follows folders that come later', async () => {
    start();
    mkdirSync(join(directory, 'sub'));
    put('sub/a.yaml', namespace('a'));
    await eventually(() => expect(names()).toEqual(['a']));
    put('sub/a.yaml', namespace('b'));
    await eventually(() => expect(names()).toEqual(['b']));
  });

  it('keeps the last good state of a bad file, tells its place, and takes it again once mended', async () => {
    put('a.yaml', namespace('a'));
    put('b.yaml', namespace('b'));
    start();
    put('a.yaml', `${namespace('new')}---\nkind: {\n`);
    await eventually(() => expect(problems).toHaveLength(1));
    expect(problems[0]).toMatchObject({ file: join(directory, 'a.yaml'), line: 9 });
    expect(problems[0]?.column).toBeGreaterThan(0);
    put('b.yaml', namespace('b2'));
    await eventually(() => expect(names()).toEqual(['a', 'b2']));
    expect(source.problems()).toHaveLength(1);
    put('a.yaml', namespace('new'));
    await eventually(() => expect(names()).toEqual(['new', 'b2']));
    expect(source.problems()).toEqual([]);
    expect(problems).toHaveLength(1);
  });

  it('drops nothing while a file is rewritten in place, slowly', async () => {
    const text = namespace('a') + Array.from({ length: 20 }, (_, n) => `---\n${namespace(`n${n}`)}`).join('');
    put('a.yaml', text);
    start();
    expect(names()).toHaveLength(21);
    put('a.yaml', '');
    await pause(150);
    for (let at = 0; at < text.length; at += 100) {
      appendFileSync(join(directory, 'a.yaml'), text.slice(at, at + 100));
      await pause(3);
    }
    await pause(150);
    expect(states.every(({ namespaces }) => namespaces.length === 21)).toBe(true);
    expect(source.problems()).toEqual([]);
  });

  it('drops nothing when a file is replaced by removing it first', async () => {
    put('a.yaml', namespace('a'));
    start();
    rmSync(join(directory, 'a.yaml'));
    await pause(20);
    put('a.yaml', namespace('a'));
    await pause(200);
    expect(states).toHaveLength(1);
  });

  it('keeps everything when the folder vanishes or is replaced by an empty one', async () => {
    put('a.yaml', namespace('a'));
    start();
    renameSync(directory, `${directory}.old`);
    try {
      await eventually(() => expect(source.problems()[0]?.message).toMatch(/ENOENT/));
      mkdirSync(directory);
      await eventually(() => expect(source.problems()[0]?.message).toMatch(/without manifests/));
      expect(states).toHaveLength(1);
      put('b.yaml', namespace('b'));
      await eventually(() => expect(names()).toEqual(['b']));
      put('b.yaml', namespace('b2'));
      await eventually(() => expect(names()).toEqual(['b2']));
    } finally {
      rmSync(`${directory}.old`, { recursive: true });
    }
  });

  it('lets the first file by name win and says so', async () => {
    put('b.yaml', namespace('a', 'none'));
    put('a.yaml', namespace('a', 'ambient'));
    start();
    expect(names()).toEqual(['a']);
    expect(states[0]?.namespaces[0]?.metadata.labels).toEqual({ 'istio.io/dataplane-mode': 'ambient' });
    expect(problems[0]).toMatchObject({ file: join(directory, 'b.yaml'), line: 1 });
    rmSync(join(directory, 'a.yaml'));
    await eventually(() =>
      expect(states.at(-1)?.namespaces[0]?.metadata.labels).toEqual({ 'istio.io/dataplane-mode': 'none' }),
    );
  });

  it('says nothing where two files agree, and stays complete where they do not', async () => {
    put('a.yaml', namespace('a'));
    put('b.yaml', namespace('a'));
    start();
    expect(names()).toEqual(['a']);
    expect(problems).toEqual([]);
    put('b.yaml', namespace('a', 'none'));
    await eventually(() => expect(problems).toMatchObject([{ severity: 'duplicate' }]));
    expect(source.complete).toBe(true);
  });

  it('takes an earlier run for what cannot be read, and knows what may hide a policy', async () => {
    put('a.yaml', 'kind: [');
    put('b.yaml', 'kind: [');
    put('c.yaml', 'kind: [AuthorizationPolicy');
    start(new Map([['a.yaml', namespace('a')]]));
    expect(names()).toEqual(['a']);
    expect(source.complete).toBe(false);
    expect(source.unknownPolicies()).toEqual([join(directory, 'c.yaml')]);
    expect(source.texts()).toEqual(new Map([['a.yaml', namespace('a')]]));
    put('c.yaml', namespace('c'));
    await eventually(() => expect(names()).toEqual(['a', 'c']));
    expect(source.unknownPolicies()).toEqual([]);
    // Broken again, it is no stranger any more.
    put('c.yaml', 'kind: [AuthorizationPolicy');
    await eventually(() => expect(source.problems().filter(({ file }) => file.endsWith('c.yaml'))).toHaveLength(1));
    expect(source.unknownPolicies()).toEqual([]);
    expect(names()).toEqual(['a', 'c']);
  });

  it('keeps objects the same that did not change, and knows where they are', async () => {
    const pod = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'p', namespace: 'a' } };
    put('a.yaml', `${namespace('a')}---\n${stringify(pod)}`);
    start();
    const before = states[0]?.pods[0];
    expect(source.locate(before ?? {})).toBe(`${join(directory, 'a.yaml')}:8`);
    put('a.yaml', `# more\n${namespace('a', 'none')}---\n${stringify(pod)}`);
    await eventually(() => expect(states).toHaveLength(2));
    expect(states[1]?.pods[0]).toBe(before);
    expect(source.locate(before ?? {})).toBe(`${join(directory, 'a.yaml')}:9`);
  });

  it('reads mounted ConfigMaps, whose files are links that change all at once', async () => {
    mkdirSync(join(directory, '..1'));
    put('..1/a.yaml', namespace('a'));
    symlinkSync('..1', join(directory, '..data'));
    symlinkSync('..data/a.yaml', join(directory, 'a.yaml'));
    start();
    expect(names()).toEqual(['a']);
    mkdirSync(join(directory, '..2'));
    put('..2/a.yaml', namespace('b'));
    symlinkSync('..2', join(directory, '..new'));
    renameSync(join(directory, '..new'), join(directory, '..data'));
    await eventually(() => expect(names()).toEqual(['b']));
  });
});
