/** Capture of pods' connections, on the kernel of a guest. */
import { runInGuest } from './lib/suite.ts';

runInGuest(
  'capture',
  [
    'capture-drain',
    'capture-guard',
    'capture-inbound',
    'capture-killed',
    'capture-only-ip4',
    'capture-outbound',
    'capture-packets',
    'capture-probes',
  ],
  { cpus: 1 },
);
