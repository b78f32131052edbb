/** For programs that run outside of vitest (`node --import ./test/lib/typescript.ts`): a `.js` import in src/ is its `.ts` file. */
import { registerHooks } from 'node:module';

registerHooks({
  resolve(specifier, context, next) {
    const source = specifier.startsWith('.') && context.parentURL?.includes('/src/') && specifier.endsWith('.js');
    return next(source ? `${specifier.slice(0, -3)}.ts` : specifier, context);
  },
});
