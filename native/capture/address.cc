// Text of addresses, both ways.
#include "address.h"

#include <arpa/inet.h>

#include <cstring>

#include "error.h"

namespace ebbtide::capture {

Address mapIp4(uint32_t network_order) {
  return {0, 0, htonl(0xffff), network_order};
}

bool isMapped(const Address& a) {
  return a[0] == 0 && a[1] == 0 && a[2] == htonl(0xffff);
}

bool isLoopback(const Address& a) {
  if (isMapped(a)) return (ntohl(a[3]) >> 24) == 127;
  return a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == htonl(1);
}

Address parseAddress(const std::string& text) {
  in_addr ip4;
  Address address;
  if (inet_pton(AF_INET, text.c_str(), &ip4) == 1) return mapIp4(ip4.s_addr);
  if (inet_pton(AF_INET6, text.c_str(), address.data()) == 1) return address;
  throw CaptureError("'" + text + "' is not an IP address", EINVAL);
}

std::string formatAddress(const Address& address) {
  char text[INET6_ADDRSTRLEN];
  if (isMapped(address))
    inet_ntop(AF_INET, &address[3], text, sizeof(text));
  else
    inet_ntop(AF_INET6, address.data(), text, sizeof(text));
  return text;
}

}  // namespace ebbtide::capture
