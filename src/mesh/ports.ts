/** Ports that are part of the ambient contract; the reasons are in Istio's architecture/ambient documents. */

/** HBONE (HTTP/2 CONNECT over mutual TLS) at the destination pod's address. */
export const HBONE_PORT = 15008;
/** Admin interface of the proxy, loopback only. */
export const ADMIN_PORT = 15000;
/** Prometheus metrics of the proxy. */
export const METRICS_PORT = 15020;
/** Readiness of the proxy. */
export const READINESS_PORT = 15021;
/** Metrics and readiness of the agent; Istio's node agent has its metrics there. */
export const AGENT_PORT = 15014;
/** xDS and certificate authority of the controller. */
export const CONTROLLER_PORT = 15012;
