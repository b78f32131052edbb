import { describe, expect, it } from 'vitest';
import { decideEnrolment } from '../../src/mesh/enrolment.ts';
import type { Namespace, Pod } from '../../src/mesh/kubernetes.ts';

const LABEL = 'istio.io/dataplane-mode';
const podWith = (label: string | undefined, more: Partial<Pod> = {}, namespace = 'team'): Pod => ({
  metadata: { name: 'p', namespace, uid: 'u', ...(label === undefined ? {} : { labels: { [LABEL]: label } }) },
  status: { phase: 'Running', podIP: '10.0.0.1' },
  ...more,
});
const namespaceWith = (label: string | undefined): Namespace => ({
  metadata: { name: 'team', ...(label === undefined ? {} : { labels: { [LABEL]: label } }) },
});

describe('labels', () => {
  // Rows: the pod's label; columns: the namespace's.
  const values = [undefined, 'ambient', 'none', 'sidecar'] as const;
  const wanted: Record<string, readonly boolean[]> = {
    undefined: [false, true, false, false],
    ambient: [true, true, true, true],
    none: [false, false, false, false],
    sidecar: [false, true, false, false],
  };
  for (const own of values) {
    values.forEach((inherited, column) => {
      const enrol = wanted[String(own)]?.[column];
      it(`pod ${own}, namespace ${inherited}: ${enrol ? 'in' : 'out'}`, () => {
        expect(decideEnrolment(podWith(own), namespaceWith(inherited)).enrol).toBe(enrol);
      });
    });
  }

  it('an unknown namespace has chosen nothing', () => {
    expect(decideEnrolment(podWith(undefined), undefined)).toEqual({ enrol: false, reason: 'not labelled' });
    expect(decideEnrolment(podWith('ambient'), undefined)).toEqual({ enrol: true });
  });
});

describe('pods that are never captured although labelled', () => {
  const metadata = podWith('ambient').metadata;
  const cases: readonly (readonly [string, Pod, string])[] = [
    ['hostNetwork', podWith('ambient', { spec: { hostNetwork: true } }), 'uses the network of the node (hostNetwork)'],
    [
      'sidecar annotation, even empty',
      podWith('ambient', { metadata: { ...metadata, annotations: { 'sidecar.istio.io/status': '' } } }),
      'has a sidecar',
    ],
    ['kube-system', podWith('ambient', {}, 'kube-system'), 'namespace is excluded'],
    ['succeeded', podWith('ambient', { status: { phase: 'Succeeded', podIP: '10.0.0.1' } }), 'has ended'],
    ['failed', podWith('ambient', { status: { phase: 'Failed', podIP: '10.0.0.1' } }), 'has ended'],
    ['no address', podWith('ambient', { status: { phase: 'Pending' } }), 'has no address yet'],
    ['no status', { metadata }, 'has no address yet'],
    ['empty address', podWith('ambient', { status: { podIP: '' } }), 'has no address yet'],
  ];
  for (const [name, pod, reason] of cases) {
    it(name, () => expect(decideEnrolment(pod, namespaceWith('ambient'))).toEqual({ enrol: false, reason }));
  }

  it('podIPs alone are addresses enough', () => {
    const pod = podWith('ambient', { status: { podIPs: [{ ip: 'fd00::1' }] } });
    expect(decideEnrolment(pod, undefined)).toEqual({ enrol: true });
  });

  it('excluded namespaces can be chosen', () => {
    expect(decideEnrolment(podWith('ambient'), undefined, ['team']).enrol).toBe(false);
    expect(decideEnrolment(podWith('ambient', {}, 'kube-system'), undefined, []).enrol).toBe(true);
  });
});
