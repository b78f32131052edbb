// What each reason is called and what to do about it.
#include "reason.h"

#include <array>
#include <cstddef>

namespace ebbtide {

namespace {

struct Words {
  Reason reason;
  const char* name;
  const char* flag;
  const char* hint;
};

constexpr size_t kReasons = static_cast<size_t>(Reason::kCount);

// In the order of the enumeration, which the check below proves.
constexpr std::array<Words, kReasons> kWords = {{
    {Reason::kNone, "none", "-", ""},
    {Reason::kPolicyDenied, "policy-denied", "DENY",
     "a DENY policy matches this client; change the policy or the client"},
    {Reason::kPolicyNoAllow, "policy-no-allow", "DENY",
     "ALLOW policies select this workload and none allows this client; add a rule for it"},
    {Reason::kPolicyUnknown, "policy-unknown", "DENY",
     "the workload names a policy that the control plane has not sent; check the controller and its push"},
    {Reason::kPolicyChanged, "policy-changed", "DENY",
     "policy changed and does not allow this connection any more"},
    {Reason::kUnknownLocalWorkload, "unknown-local-workload", "-",
     "the control plane has not described this pod; check that the controller is reachable and knows the "
     "pod's node"},
    {Reason::kNoCertificate, "no-certificate", "IDENTITY_ERROR",
     "the pod's certificate could not be had in time; check the certificate authority and the proxy's token"},
    {Reason::kNoHealthyEndpoint, "no-healthy-endpoint", "CONNECT",
     "the service has no usable endpoint or does not define this port; check its selector, readiness and "
     "ports"},
    {Reason::kConnectRefused, "connect-refused", "CONNECT",
     "nothing listens on the destination port, or a firewall resets it"},
    {Reason::kConnectTimeout, "connect-timeout", "CONNECT",
     "no answer from the next hop; maybe a NetworkPolicy or firewall blocks it (HBONE needs TCP 15008)"},
    {Reason::kConnectFailed, "connect-failed", "CONNECT",
     "the next hop cannot be reached; see the error text"},
    {Reason::kTlsHandshakeFailed, "tls-handshake-failed", "TLS_FAILURE",
     "check both certificates: chain, expiry, and that both sides trust the same root"},
    {Reason::kTlsHandshakeTimeout, "tls-handshake-timeout", "TLS_FAILURE",
     "the peer accepted TCP and did not finish TLS; it is overloaded, waits for a certificate or speaks no "
     "TLS"},
    {Reason::kPeerIdentityMismatch, "peer-identity-mismatch", "IDENTITY_ERROR",
     "the server proved another identity than expected; addresses may have moved to another pod, retry "
     "later"},
    {Reason::kPeerUntrusted, "peer-untrusted", "TLS_FAILURE",
     "the client has no certificate that this mesh trusts; check its root and trust domain"},
    {Reason::kH2HandshakeFailed, "h2-handshake-failed", "H2_HANDSHAKE_FAILURE",
     "the peer does not speak HTTP/2 on its HBONE port"},
    {Reason::kConnectRejected, "connect-rejected", "CONNECT",
     "the far proxy refused; its own log names the reason"},
    {Reason::kConnectResponseTimeout, "connect-response-timeout", "CONNECT",
     "the far proxy did not answer CONNECT; the application behind it may be unreachable"},
    {Reason::kBadRequest, "bad-request", "-", "the peer sent a request that is not HBONE"},
    {Reason::kAuthorityNotLocal, "authority-not-local", "-",
     "the request names another destination than this pod; the sender's view of addresses is out of date"},
    {Reason::kIllegalPort, "illegal-port", "-",
     "ports 15001, 15006 and 15008 belong to the mesh and cannot be called through it"},
    {Reason::kLoop, "loop", "-",
     "the connection leads back into the proxy; its original destination is not known"},
    {Reason::kApplicationReset, "application-reset", "-", "one of the two applications reset the connection"},
    {Reason::kTunnelLost, "tunnel-lost", "CONNECT",
     "the connection between the two proxies broke; check the network between the nodes"},
    {Reason::kDrained, "drained", "-", "ended by this proxy: it stops, or the pod left the mesh"},
    {Reason::kUnsupportedDestination, "unsupported-destination", "CONNECT",
     "the destination is on another network or has only a host name, which is not supported"},
    {Reason::kInternal, "internal", "-", "an error inside the proxy; see the error text and report it"},
    {Reason::kTooManyConnections, "too-many-connections", "-",
     "the pod holds its share of this proxy's connections; look for a client that opens too many, or raise "
     "the "
     "proxy's limit of open files"},
    {Reason::kBuffersFull, "buffers-full", "-",
     "the pod's applications leave unread more than the proxy holds for one pod; look for one that stopped "
     "reading"},
}};

constexpr bool inOrder() {
  for (size_t i = 0; i < kReasons; ++i) {
    if (static_cast<size_t>(kWords[i].reason) != i) return false;
  }
  return true;
}
static_assert(inOrder());

const Words& words(Reason reason) {
  const auto index = static_cast<size_t>(reason);
  return kWords[index < kReasons ? index : static_cast<size_t>(Reason::kInternal)];
}

}  // namespace

const char* reasonName(Reason reason) {
  return words(reason).name;
}
const char* reasonHint(Reason reason) {
  return words(reason).hint;
}
const char* reasonResponseFlag(Reason reason) {
  return words(reason).flag;
}

}  // namespace ebbtide
