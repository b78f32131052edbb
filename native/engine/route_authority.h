// Text that a peer sends with CONNECT: the :authority and the forwarded header. Nothing here is trusted.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "model.h"

namespace ebbtide {

struct Authority {
  std::optional<IpAddress> ip;
  std::string hostname;  // lower case, "" if `ip`
  uint16_t port = 0;
};

// "10.0.0.1:80", "[fd00::1]:80" or "host.name:80"; none for anything else, and for port 0.
std::optional<Authority> parseAuthority(std::string_view text);

// Value of the first host parameter of a Forwarded header (RFC 7239), quotes removed; "" if there is none.
std::string_view forwardedHost(std::string_view header);

}  // namespace ebbtide
