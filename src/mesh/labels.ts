/** Labels and annotations that Ebbtide reads or writes; all but the `ebbtide.dev` ones are Istio ambient's. */

/** Label on Namespace and Pod: `ambient` opts in, `none` opts out; the pod's label wins. */
export const DATAPLANE_MODE_LABEL = 'istio.io/dataplane-mode';
export const DATAPLANE_MODE_AMBIENT = 'ambient';
export const DATAPLANE_MODE_NONE = 'none';
/** Annotation on Pod, written by the node agent: `enabled` once capture and proxy are in place. */
export const REDIRECTION_ANNOTATION = 'ambient.istio.io/redirection';
export const REDIRECTION_ENABLED = 'enabled';
/** The pod is to be in the mesh, and is not yet, or its proxy does not serve it. */
export const REDIRECTION_PENDING = 'pending';
/** Annotation on Pod whose presence (any value) means a sidecar is there: never captured. */
export const SIDECAR_STATUS_ANNOTATION = 'sidecar.istio.io/status';
/** Annotation on Pod: `true` leaves connections to the pod alone and captures only what it opens. */
export const BYPASS_INBOUND_ANNOTATION = 'ambient.istio.io/bypass-inbound-capture';
/** Annotation on Pod that would switch the capture of DNS; read only to say that it has no effect. */
export const DNS_CAPTURE_ANNOTATION = 'ambient.istio.io/dns-capture';
/** Annotations of a static pod's mirror: the second is the UID by which the kubelet names the pod's cgroup. */
export const MIRROR_ANNOTATION = 'kubernetes.io/config.mirror';
export const CONFIG_HASH_ANNOTATION = 'kubernetes.io/config.hash';
/** Annotation on Pod, for clusters without a container runtime: path of the pod's network namespace. */
export const NETNS_ANNOTATION = 'ebbtide.dev/netns';
/** Name of the namespace whose policies are mesh wide. */
export const ROOT_NAMESPACE = 'istio-system';
/** Namespaces whose pods are never captured, as istio-cni's `excludeNamespaces` default has it. */
export const EXCLUDED_NAMESPACES: readonly string[] = ['kube-system'];
/** ConfigMap in every namespace that holds the mesh's root certificates as PEM, and its key. */
export const ROOT_CONFIG_MAP = 'istio-ca-root-cert';
export const ROOT_CONFIG_MAP_KEY = 'root-cert.pem';
