// Text forms of addresses and identities.
#include "model.h"

#include <arpa/inet.h>

#include <cstring>

namespace ebbtide {

namespace {
constexpr uint8_t kMappedPrefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
}  // namespace

IpAddress IpAddress::fromV4(const void* four_bytes) {
  IpAddress address;
  std::memcpy(address.bytes.data(), four_bytes, 4);
  return address;
}

IpAddress IpAddress::fromV6(const void* sixteen_bytes) {
  const auto* raw = static_cast<const uint8_t*>(sixteen_bytes);
  if (std::memcmp(raw, kMappedPrefix, sizeof kMappedPrefix) == 0) return fromV4(raw + sizeof kMappedPrefix);
  IpAddress address;
  address.v4 = false;
  std::memcpy(address.bytes.data(), raw, 16);
  return address;
}

std::optional<IpAddress> IpAddress::parse(const std::string& text) {
  // inet_pton stops at a NUL, a std::string does not.
  if (text.find('\0') != std::string::npos) return std::nullopt;
  uint8_t raw[16];
  if (inet_pton(AF_INET, text.c_str(), raw) == 1) return fromV4(raw);
  if (inet_pton(AF_INET6, text.c_str(), raw) == 1) return fromV6(raw);
  return std::nullopt;
}

std::string IpAddress::toString() const {
  char text[INET6_ADDRSTRLEN];
  inet_ntop(v4 ? AF_INET : AF_INET6, bytes.data(), text, sizeof text);
  return text;
}

bool IpAddress::isLoopback() const {
  if (v4) return bytes[0] == 127;
  for (size_t i = 0; i < 15; ++i) {
    if (bytes[i] != 0) return false;
  }
  return bytes[15] == 1;
}

std::string SocketAddress::toString() const {
  std::string text = ip.v4 ? ip.toString() : "[" + ip.toString() + "]";
  return text + ":" + std::to_string(port);
}

// Exactly trust domain, "ns", namespace, "sa", service account. An empty segment names nobody, so it is no
// identity (ztunnel would take it).
std::optional<Identity> Identity::parse(const std::string& spiffe_uri) {
  constexpr std::string_view scheme = "spiffe://";
  std::string_view rest = spiffe_uri;
  if (!rest.starts_with(scheme) || rest.find('\0') != std::string_view::npos) return std::nullopt;
  rest.remove_prefix(scheme.size());
  std::string_view segments[5];
  for (size_t i = 0; i < 5; ++i) {
    const size_t slash = rest.find('/');
    const bool last = i == 4;
    if (last != (slash == std::string_view::npos)) return std::nullopt;
    segments[i] = rest.substr(0, slash);
    if (segments[i].empty()) return std::nullopt;
    if (!last) rest.remove_prefix(slash + 1);
  }
  if (segments[1] != "ns" || segments[3] != "sa") return std::nullopt;
  return Identity{std::string(segments[0]), std::string(segments[2]), std::string(segments[4])};
}

std::string Identity::uri() const {
  return "spiffe://" + principal();
}

std::string Identity::principal() const {
  return trust_domain + "/ns/" + ns + "/sa/" + service_account;
}

}  // namespace ebbtide
