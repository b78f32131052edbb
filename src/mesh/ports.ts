/** Ports that are part of the ambient contract; the reasons are in Istio's architecture/ambient documents. */

/** HBONE (HTTP/2 CONNECT over mutual TLS) at the destination pod's address. */
export const HBONE_PORT = 15008;
/** Name of the outbound listener: what a pod's own connections are steered to. */
export const OUTBOUND_PORT = 15001;
/** Name of the plaintext inbound listener: connections to the pod that did not come by HBONE. */
export const INBOUND_PLAINTEXT_PORT = 15006;
/** Admin interface of the proxy, loopback only. */
export const ADMIN_PORT = 15000;
/** Prometheus metrics of the proxy. */
export const METRICS_PORT = 15020;
/** Readiness of the proxy. */
export const READINESS_PORT = 15021;
/** xDS and certificate authority of the controller. */
export const CONTROLLER_PORT = 15012;
