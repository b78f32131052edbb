/** The Kubernetes API as agent and controller use it: single requests, and lists that are kept up to date. */
export { SERVICE_ACCOUNT_DIRECTORY } from './access.js';
export { type Api, ApiError, type ApiOptions, openApi, type RequestOptions } from './api.js';
export { type ApiObject, Watched, type WatchedCounters, type WatchedOptions } from './watched.js';
