// Fuzzes what a peer writes into CONNECT: authority, forwarded, traceparent, and the identity of a
// certificate.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "connect_headers.h"
#include "model.h"
#include "route_authority.h"

using namespace ebbtide;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  if (auto authority = parseAuthority(text)) {
    if (authority->port == 0) std::abort();
    if (authority->ip.has_value() == !authority->hostname.empty()) std::abort();
    // What was understood reads back the same.
    if (authority->ip) {
      auto again = parseAuthority(SocketAddress{*authority->ip, authority->port}.toString());
      if (!again || again->ip != authority->ip || again->port != authority->port) std::abort();
    }
  }
  if (auto address = forwardedFor(text); address && address->port == 0) std::abort();
  auto host = forwardedHost(text);
  if (!host.empty() && text.find(host) == std::string::npos) std::abort();
  auto trace = traceIdOf(text);
  if (!trace.empty() && trace.size() != 32) std::abort();
  if (auto identity = Identity::parse(text); identity && identity->uri() != text) std::abort();
  return 0;
}
