/**
 * `npm run test:vm [-- --kernel NAME] [--group NAME] [--keep] [--verbose]`: every group of tests in guests, a file of this
 * folder each, on every kernel, two guests' worth at a time; then a table of kernels and groups.
 */
import { parseArgs } from 'node:util';
import { packagesImage, userlandImage } from './lib/images.ts';
import { findKernel, isKernelCached, KERNELS, type Kernel, type KernelName } from './lib/kernels.ts';
import { HARNESS, makePlace, removePlace, sweepPlaces } from './lib/place.ts';
import { printReport } from './lib/report.ts';
import { findGroups, kernelsFor, type Outcome, Runner } from './lib/runner.ts';

const say = (text: string): void => void process.stderr.write(`vm: ${text}\n`);

function fail(text: string): never {
  say(text);
  process.exit(2);
}

const { values } = parseArgs({
  options: {
    kernel: { type: 'string', multiple: true },
    group: { type: 'string', multiple: true },
    jobs: { type: 'string', default: '2' },
    keep: { type: 'boolean', default: false },
    verbose: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
const groups = findGroups(HARNESS);
if (values.help) {
  process.stdout.write(`Usage: npm run test:vm -- [options]

Tests in virtual machines, on kernels of Debian, with this machine's Debian packages and this checkout.

  --kernel NAME  ${KERNELS.join(', ')} (default: all; may be given more than once)
  --group NAME   ${groups.join(', ')} (default: all; may be given more than once)
  --jobs N       groups at the same time (default 2)
  --keep         leave what guests had (console, disks) until the next run, and say where
  --verbose      show what tests in guests say while they run

Environment: EBBTIDE_CACHE is the folder of kernels and images (default ~/.cache/ebbtide); EBBTIDE_VM_ACCELERATOR is kvm or
tcg (default: kvm where it works); EBBTIDE_VM_KERNEL is the kernel of a file that is run by vitest itself.
`);
  process.exit(0);
}
const unknown = [
  ...(values.kernel ?? []).filter((each) => !KERNELS.includes(each as KernelName)),
  ...(values.group ?? []).filter((each) => !groups.includes(each)),
];
if (unknown.length > 0) fail(`there is no ${unknown.join(', ')}; see --help`);
const jobs = Number(values.jobs);
if (!Number.isInteger(jobs) || jobs < 1) fail(`--jobs is ${values.jobs}; give a number from 1 on`);

sweepPlaces();
const started = performance.now();
const kernels: Kernel[] = [];
for (const name of (values.kernel as KernelName[] | undefined) ?? KERNELS) {
  if (!(await isKernelCached(name))) say(`downloading kernel ${name}`);
  kernels.push(await findKernel(name).catch((error: Error) => fail(error.message)));
}
// Before the first guests, which would else build them at the same time.
await userlandImage(say);
await packagesImage();

const results = makePlace();
const runner = new Runner({ results, keep: values.keep, verbose: values.verbose, say });
let interrupted = false;
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    if (!interrupted) say('interrupted: ending the guests');
    interrupted = true;
    runner.stop();
  });
}
const outcomes: Outcome[] = [];
try {
  // The groups that take longest begin first, so that none is left alone at the end.
  const queue = (values.group ?? groups).flatMap((group) =>
    kernelsFor(group, kernels).map((kernel) => ({ group, kernel: kernel.name })),
  );
  const work = async (): Promise<void> => {
    for (let next = queue.shift(); next !== undefined && !interrupted; next = queue.shift())
      outcomes.push(await runner.run(next.kernel, next.group));
  };
  await Promise.all(Array.from({ length: jobs }, work));
} finally {
  removePlace(results);
  if (!values.keep) sweepPlaces();
}
const failed = printReport(kernels, values.group ?? groups, outcomes, (performance.now() - started) / 1000);
process.exit(interrupted ? 130 : failed > 0 ? 1 : 0);
