// IP addresses as the BPF maps hold them: four words in network order, IPv4 as ::ffff:a.b.c.d.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace ebbtide::capture {

using Address = std::array<uint32_t, 4>;

// Throws CaptureError when the text is no IPv4 or IPv6 address.
Address parseAddress(const std::string& text);
std::string formatAddress(const Address& address);
Address mapIp4(uint32_t network_order);
bool isMapped(const Address& address);
bool isLoopback(const Address& address);

}  // namespace ebbtide::capture
