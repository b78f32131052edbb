/** Capture of pods' connections, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest('capture', [
  'capture-guard',
  'capture-hold',
  'capture-hostile',
  'capture-inbound',
  'capture-inherited',
  'capture-killed',
  'capture-lifecycle',
  'capture-only-ip4',
  'capture-outbound',
  'capture-packets',
  'capture-probes',
]);
