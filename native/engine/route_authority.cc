// Parses what a peer wrote, refusing whatever is not exactly one of the expected forms.
#include "route_authority.h"

#include <algorithm>
#include <charconv>

namespace ebbtide {

namespace {

constexpr size_t kMaxHostname = 253;

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

bool isHostnameCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_';
}

bool equalsIgnoringCase(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](char x, char y) { return lower(x) == lower(y); });
}

}  // namespace

std::optional<Authority> parseAuthority(std::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return std::nullopt;
  const std::string_view digits = text.substr(colon + 1);
  std::string_view host = text.substr(0, colon);

  Authority authority;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), authority.port);
  if (error != std::errc() || end != digits.data() + digits.size() || digits.front() == '0')
    return std::nullopt;

  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    if (host.find(':') == std::string_view::npos) return std::nullopt;
    authority.ip = IpAddress::parse(std::string(host));
    return authority.ip ? std::optional(authority) : std::nullopt;
  }
  if (host.empty() || host.size() > kMaxHostname) return std::nullopt;
  authority.hostname.resize(host.size());
  std::transform(host.begin(), host.end(), authority.hostname.begin(), lower);
  if (!std::all_of(authority.hostname.begin(), authority.hostname.end(), isHostnameCharacter))
    return std::nullopt;
  authority.ip = IpAddress::parse(authority.hostname);
  if (authority.ip) authority.hostname.clear();
  return authority;
}

std::string_view forwardedHost(std::string_view header) {
  // Elements are separated by commas, their parameters by semicolons; neither occurs in the values that we
  // look for.
  while (!header.empty()) {
    const size_t end = std::min(header.find_first_of(",;"), header.size());
    const std::string_view parameter = trimmed(header.substr(0, end));
    header.remove_prefix(std::min(end + 1, header.size()));
    const size_t equals = parameter.find('=');
    if (equals == std::string_view::npos || !equalsIgnoringCase(trimmed(parameter.substr(0, equals)), "host"))
      continue;
    std::string_view value = trimmed(parameter.substr(equals + 1));
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"')
      value = value.substr(1, value.size() - 2);
    return value;
  }
  return {};
}

}  // namespace ebbtide
