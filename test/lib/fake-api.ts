import type { Api, ApiError, RequestOptions } from '../../src/mesh/api/index.ts';

/** The API, writing down what it was asked; the kubernetes tests ask a real one. */
export class FakeApi {
  readonly asked: { method: string; path: string; body: unknown }[] = [];
  failure: ApiError | undefined;
  readonly api = {
    request: async (method: string, path: string, { body }: RequestOptions = {}) => {
      this.asked.push({ method, path, body });
      if (this.failure !== undefined) throw this.failure;
      return {};
    },
  } as unknown as Api;
}
