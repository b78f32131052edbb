/** The proxy's face of native/engine: types of what crosses, and the one place where the addon is loaded. */

export interface EngineOptions {
  readonly workers: number;
  readonly nodeName: string;
  readonly network: string;
  readonly clusterId: string;
  readonly streamWindow: number;
  readonly connectionWindow: number;
  readonly frameSize: number;
  readonly maxStreamsPerConnection: number;
  readonly poolIdleMs: number;
}

export interface LocalPod {
  readonly uid: string;
  readonly name: string;
  readonly namespace: string;
  readonly serviceAccount: string;
  /** The engine owns and closes it, also when addPod fails. */
  readonly netnsFd: number;
}

export interface PortMapping {
  readonly servicePort: number;
  readonly targetPort: number;
}

/** Addresses are raw bytes, 4 or 16, as WDS has them. */
export interface GatewayAddress {
  readonly hostname?: { readonly namespace: string; readonly hostname: string };
  readonly address?: { readonly network: string; readonly address: Uint8Array };
  readonly hboneMtlsPort: number;
}

/** WDS Workload, checked and with defaults filled in (trustDomain, serviceAccount, clusterId, capacity never empty). */
export interface EngineWorkload {
  readonly uid: string;
  readonly name: string;
  readonly namespace: string;
  readonly addresses: readonly Uint8Array[];
  readonly hostname: string;
  readonly network: string;
  readonly hbone: boolean;
  readonly trustDomain: string;
  readonly serviceAccount: string;
  readonly waypoint?: GatewayAddress;
  readonly networkGateway?: GatewayAddress;
  readonly node: string;
  readonly canonicalName: string;
  readonly canonicalRevision: string;
  readonly workloadName: string;
  readonly workloadType: 'deployment' | 'cronjob' | 'pod' | 'job';
  readonly applicationTunnel?: { readonly proxy: boolean; readonly port: number };
  readonly services: readonly { readonly key: string; readonly ports: readonly PortMapping[] }[];
  readonly authorizationPolicies: readonly string[];
  readonly healthy: boolean;
  readonly clusterId: string;
  readonly locality: { readonly region: string; readonly zone: string; readonly subzone: string };
  readonly hostNetwork: boolean;
  readonly capacity: number;
}

export interface EngineService {
  readonly name: string;
  readonly namespace: string;
  readonly hostname: string;
  readonly vips: readonly { readonly network: string; readonly address: Uint8Array; readonly length?: number }[];
  readonly ports: readonly PortMapping[];
  readonly subjectAltNames: readonly string[];
  readonly waypoint?: GatewayAddress;
  readonly weightedWaypoints: readonly { readonly destination: GatewayAddress; readonly weight: number }[];
  /** LoadBalancing.Scope numbers, in order. */
  readonly routingPreference: readonly number[];
  /** LoadBalancing.Mode number. */
  readonly mode: number;
  readonly allowUnhealthy: boolean;
  /** IPFamilies number. */
  readonly ipFamilies: number;
  readonly canonical: boolean;
  readonly namespaceVisibility: boolean;
}

export interface EngineStringMatch {
  readonly kind: 'exact' | 'prefix' | 'suffix' | 'presence';
  readonly value: string;
}

export interface AttributeOf<T> {
  readonly anyOf: readonly T[];
  readonly noneOf: readonly T[];
}

export interface EnginePolicyMatch {
  readonly namespaces: AttributeOf<EngineStringMatch>;
  readonly principals: AttributeOf<EngineStringMatch>;
  readonly sourceIps: AttributeOf<{ readonly address: Uint8Array; readonly length: number }>;
  readonly destinationIps: AttributeOf<{ readonly address: Uint8Array; readonly length: number }>;
  readonly destinationPorts: AttributeOf<number>;
  readonly serviceAccounts: AttributeOf<{ readonly namespace: string; readonly serviceAccount: string }>;
  /** Some element was not understood: an ALLOW then never matches, a DENY takes the element as matching. */
  readonly malformed: boolean;
}

export interface EnginePolicy {
  readonly name: string;
  readonly namespace: string;
  readonly scope: 'global' | 'namespace' | 'workload';
  readonly action: 'allow' | 'deny';
  readonly dryRun: boolean;
  /** rules ORed, clauses of a rule ANDed, matches of a clause ORed */
  readonly rules: readonly (readonly (readonly EnginePolicyMatch[])[])[];
}

export interface StateDelta {
  readonly workloads: readonly EngineWorkload[];
  readonly services: readonly EngineService[];
  readonly policies: readonly EnginePolicy[];
  /** Workload uids and service keys mixed, as WDS removes them. */
  readonly removedAddresses: readonly string[];
  readonly removedPolicies: readonly string[];
}

export interface CertificateBundle {
  readonly chainPem: string;
  readonly keyPem: string;
  readonly rootsPem: string;
}

/** What an access log line says of a workload; absent when the workload is not known. */
export interface AccessWorkload {
  readonly name: string;
  readonly namespace: string;
  readonly cluster: string;
}

/** A connection that ended or was refused. Byte counts are from the reporter's application's point of view. */
export interface AccessRecord {
  readonly inbound: boolean;
  /** false: refused or failed before bytes could flow */
  readonly established: boolean;
  /** Enumerated reason, kebab case: `none`, `policy-denied`, ... (native/engine/reason.h) */
  readonly reason: string;
  readonly hint: string;
  /** Istio's response_flags value: `-`, `DENY`, `CONNECT`, ... */
  readonly responseFlag: string;
  readonly detail: string;
  /** ip:port */
  readonly source: string;
  readonly destination: string;
  readonly hboneAddress: string;
  readonly sourceWorkload?: AccessWorkload;
  readonly destinationWorkload?: AccessWorkload;
  readonly service: string;
  readonly sourceIdentity: string;
  readonly destinationIdentity: string;
  readonly bytesSent: number;
  readonly bytesReceived: number;
  readonly durationMs: number;
  readonly traceId: string;
}

export interface TrafficSample {
  /** In the order of `trafficLabelNames`. */
  readonly labels: readonly string[];
  readonly opened: number;
  readonly closed: number;
  readonly failed: number;
  readonly receivedBytes: number;
  readonly sentBytes: number;
}

export interface ConnectionInfo {
  readonly inbound: boolean;
  readonly podUid: string;
  readonly source: string;
  readonly destination: string;
  readonly hboneAddress: string;
  readonly protocol: 'HBONE' | 'TCP';
  readonly peerIdentity: string;
  readonly bytesSent: number;
  readonly bytesReceived: number;
  readonly ageMs: number;
}

export interface EngineStats {
  readonly openConnections: number;
  readonly hboneConnections: number;
  readonly handshakes: number;
  readonly handshakeFailures: number;
  readonly bufferedBytes: number;
  readonly accessRecordsDropped: number;
  /** Exceptions and refusals to watch a descriptor; each ended one connection, or one attempt of a task. */
  readonly faults: number;
}

/** Something failed inside the engine and was contained. */
export interface EngineFault {
  /** The kind of work: `connection`, `tunnel`, `timer`, `task`, ... */
  readonly where: string;
  /** The error's text. */
  readonly what: string;
  /** How many there were since the last report; the other two are of the first of them. */
  readonly count: number;
}

export interface EngineListener {
  /** A batch of ended or refused connections. */
  onAccess(records: readonly AccessRecord[]): void;
  /** A connection waits for the certificate of this identity (SPIFFE URI). May repeat. */
  onCertificateNeeded(identity: string): void;
  onFault(fault: EngineFault): void;
}

/** The engine: worker threads that carry bytes. One per process. Every call is synchronous unless it says otherwise. */
export interface Engine {
  start(): void;
  /** Opens the pod's listeners inside its network namespace; throws with errno text. */
  addPod(pod: LocalPod): void;
  removePod(uid: string): void;
  setCertificate(identity: string, bundle: CertificateBundle): void;
  removeCertificate(identity: string): void;
  apply(delta: StateDelta): void;
  traffic(): TrafficSample[];
  connections(): ConnectionInfo[];
  stats(): EngineStats;
  /** Stops accepting, GOAWAY; resolves when the last connection ended or the deadline passed. */
  drain(deadlineMs: number): Promise<void>;
  /** Idempotent; joins all threads. Called in every exit path. */
  stopNow(): void;
}
