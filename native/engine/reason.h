// Why a connection ended or was refused. One enumeration for log, metric, HTTP status and hint; never
// reorder, TypeScript reads the names by index (reasonName).
#pragma once

#include <cstdint>

namespace ebbtide {

enum class Reason : uint8_t {
  kNone,                  // ended as its two ends wanted
  kPolicyDenied,          // a DENY policy matched
  kPolicyNoAllow,         // ALLOW policies exist, none matched
  kPolicyUnknown,         // the workload names a policy that has not been received: refused
  kPolicyChanged,         // was allowed, is not any more: cut
  kUnknownLocalWorkload,  // the pod's own workload did not arrive from the control plane in time
  kNoCertificate,         // the pod's own certificate could not be had in time
  kNoHealthyEndpoint,     // service without usable endpoint, or port not defined
  kConnectRefused,        // TCP RST from the next hop
  kConnectTimeout,        // next hop did not answer
  kConnectFailed,         // any other connect error
  kTlsHandshakeFailed,    // alert, bad chain, expired, wrong version
  kTlsHandshakeTimeout,
  kPeerIdentityMismatch,  // server certificate does not hold an expected identity
  kPeerUntrusted,         // client certificate missing, untrusted, or of another trust domain
  kH2HandshakeFailed,     // ALPN not h2, bad preface, SETTINGS
  kConnectRejected,       // CONNECT answered with another status than 200
  kConnectResponseTimeout,
  kBadRequest,              // not CONNECT, or authority without host or port
  kAuthorityNotLocal,       // CONNECT to an address that is not this pod's
  kIllegalPort,             // CONNECT or connection to the mesh's own ports
  kLoop,                    // outbound connection to the mesh's own ports on loopback
  kApplicationReset,        // one of the two applications reset the connection
  kTunnelLost,              // the HBONE connection underneath broke (keepalive, RST, GOAWAY with error)
  kDrained,                 // stopped by us: shutdown or pod gone
  kUnsupportedDestination,  // other network, hostname-only workload: not implemented, refused
  kInternal,
  kTooManyConnections,  // the pod's share of the proxy's descriptors, or of unfinished handshakes, is used up
  kBuffersFull,  // the application does not read what arrives, and its pod's share of buffers is used up
  kCount,
};

// Stable kebab-case name: "policy-denied".
const char* reasonName(Reason reason);
// What an operator can do about it, one sentence; "" for kNone.
const char* reasonHint(Reason reason);
// Istio's response_flags value: "-", "DENY", "CONNECT", "TLS_FAILURE", "H2_HANDSHAKE_FAILURE",
// "IDENTITY_ERROR".
const char* reasonResponseFlag(Reason reason);

}  // namespace ebbtide
