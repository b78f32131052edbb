/** The lab as built, for scripts that Node runs without a build of their own; types come from the sources. */
import type * as LabModule from '../../src/lab/index.ts';

export type { Lab, LabProcess, Pod } from '../../src/lab/index.ts';

const url = new URL('../../dist/lab/index.js', import.meta.url);
export const lab = (await import(url.href)) as typeof LabModule;
