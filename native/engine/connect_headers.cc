// Baggage, forwarded, traceparent and the PROXY protocol.
#include "connect_headers.h"

#include <charconv>

namespace ebbtide {

std::string baggageOf(const WorkloadPtr& workload) {
  if (!workload) return "";
  std::string text;
  auto add = [&text](std::string_view key, std::string_view value) {
    if (value.empty()) return;
    if (!text.empty()) text += ',';
    text.append(key).append("=").append(value);
  };
  add("k8s.cluster.name", workload->cluster_id);
  add("k8s.namespace.name", workload->ns);
  std::string type = workload->workload_type.empty() ? "pod" : workload->workload_type;
  add("k8s." + type + ".name", workload->workload_name);
  add("service.name", workload->canonical_name);
  add("service.version", workload->canonical_revision);
  add("cloud.region", workload->locality.region);
  add("cloud.availability_zone", workload->locality.zone);
  return text;
}

std::string forwardedOf(const SocketAddress& client, const ServicePtr& service) {
  std::string text = "for=\"" + client.toString() + "\"";
  if (service) text += ";host=" + service->hostname;
  return text;
}

std::optional<SocketAddress> parseSocketAddress(std::string_view text) {
  size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) return std::nullopt;
  std::string_view host = text.substr(0, colon), port = text.substr(colon + 1);
  bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  auto ip = IpAddress::parse(std::string(host));
  uint16_t number = 0;
  auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
  if (!ip || error != std::errc() || end != port.data() + port.size() || number == 0) return std::nullopt;
  return SocketAddress{*ip, number};
}

std::optional<SocketAddress> forwardedFor(std::string_view forwarded) {
  constexpr std::string_view kKey = "for=\"";
  size_t start = forwarded.find(kKey);
  if (start == std::string_view::npos) return std::nullopt;
  forwarded.remove_prefix(start + kKey.size());
  size_t end = forwarded.find('"');
  if (end == std::string_view::npos) return std::nullopt;
  return parseSocketAddress(forwarded.substr(0, end));
}

std::string traceparentOf(const uint8_t* random) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "00-";
  for (int i = 0; i < 24; i++) {
    if (i == 16) text += '-';
    text += kDigits[random[i] >> 4];
    text += kDigits[random[i] & 15];
  }
  return text + "-00";
}

std::string traceIdOf(std::string_view traceparent) {
  if (traceparent.size() != 55 || traceparent[2] != '-' || traceparent[35] != '-') return "";
  std::string_view id = traceparent.substr(3, 32);
  return id.find_first_not_of("0123456789abcdef") == std::string_view::npos ? std::string(id) : "";
}

std::string proxyHeader(const SocketAddress& source, const SocketAddress& destination,
                        const std::string& identity) {
  std::string body;
  auto put16 = [](std::string& out, size_t value) {
    out += static_cast<char>(value >> 8 & 0xff);
    out += static_cast<char>(value & 0xff);
  };
  auto putIp = [&body](const IpAddress& ip, bool v4) {
    if (ip.v4 && !v4) {  // families differ: both as IPv6
      body.append(10, '\0').append(2, '\xff').append(reinterpret_cast<const char*>(ip.bytes.data()), 4);
    } else {
      body.append(reinterpret_cast<const char*>(ip.bytes.data()), ip.v4 ? 4 : 16);
    }
  };
  bool v4 = source.ip.v4 && destination.ip.v4;
  putIp(source.ip, v4);
  putIp(destination.ip, v4);
  put16(body, source.port);
  put16(body, destination.port);
  if (!identity.empty()) {
    body += '\xd0';
    put16(body, identity.size());
    body += identity;
  }
  std::string text("\r\n\r\n\0\r\nQUIT\n", 12);
  text += '\x21';
  text += v4 ? '\x11' : '\x21';
  put16(text, body.size());
  return text + body;
}

}  // namespace ebbtide
