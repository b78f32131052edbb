// Locality ranks as WDS describes them, then power of two choices on live connections, weighted by capacity.
#include "route_balance.h"

#include <algorithm>
#include <array>
#include <random>

namespace ebbtide {

namespace {

// Above this many endpoints, and where all are equal before the choice, drawing beats looking at each.
constexpr size_t kDrawAbove = 32;
constexpr int kDraws = 16;

enum class Usable : uint8_t { kYes, kNo, kUnsupported };

struct Candidate {
  const Endpoint* endpoint;
  SocketAddress address;
};

bool scopeMatches(LbScope scope, const Workload& source, const Workload& endpoint, std::string_view network) {
  switch (scope) {
    case LbScope::kRegion:
      return source.locality.region == endpoint.locality.region;
    case LbScope::kZone:
      return source.locality.zone == endpoint.locality.zone;
    case LbScope::kSubzone:
      return source.locality.subzone == endpoint.locality.subzone;
    case LbScope::kNode:
      return source.node == endpoint.node;
    case LbScope::kCluster:
      return source.cluster_id == endpoint.cluster_id;
    case LbScope::kNetwork:
      return network == endpoint.network;
  }
  return false;
}

// How near an endpoint is, -1 if STRICT excludes it. Scopes count while they match from the first on. A first
// scope NETWORK is a wish: a match outranks every miss, a miss goes on with the next scope.
int rankOf(const Service& service, const Workload& source, const Workload& endpoint,
           std::string_view network) {
  if (service.lb_mode != LbMode::kStrict && service.lb_mode != LbMode::kFailover) return 0;
  const std::vector<LbScope>& scopes = service.routing_preference;
  int matched = 0, bonus = 0;
  for (size_t i = 0; i < scopes.size(); ++i) {
    const bool wish = i == 0 && scopes[i] == LbScope::kNetwork;
    if (scopeMatches(scopes[i], source, endpoint, network)) {
      ++matched;
      if (wish) bonus = static_cast<int>(scopes.size()) - 1;
    } else if (!wish) {
      break;
    }
  }
  if (service.lb_mode == LbMode::kStrict && matched != static_cast<int>(scopes.size())) return -1;
  return matched + bonus;
}

uint16_t mappedPort(const std::vector<PortMapping>& ports, uint16_t service_port) {
  for (const PortMapping& port : ports) {
    if (port.service_port == service_port) return port.target_port;
  }
  return 0;
}

class Chooser {
 public:
  Chooser(const ServiceEntry& entry, const BalanceQuery& query)
      : entry_(entry), service_(*entry.value), query_(query) {}

  BalanceChoice choose() {
    const auto port = std::find_if(service_.ports.begin(), service_.ports.end(), [&](const PortMapping& p) {
      return p.service_port == query_.service_port;
    });
    if (port != service_.ports.end()) {
      target_port_ = port->target_port;
    } else if (!query_.waypoint) {
      return {};
    }
    const bool equal =
        entry_.unequal == 0 && service_.lb_mode != LbMode::kStrict && service_.lb_mode != LbMode::kFailover;
    if (equal && entry_.endpoints.size() > kDrawAbove && draw()) return better(drawn_[0], drawn_[1]);
    return scan();
  }

 private:
  Usable usable(const Endpoint& endpoint, SocketAddress& address) const {
    const Workload& workload = endpoint.workload();
    if (!workload.healthy && !service_.allow_unhealthy) return Usable::kNo;
    if (workload.capacity == 0) return Usable::kNo;
    address.port = mappedPort(endpoint.ports(), query_.service_port);
    if (address.port == 0) address.port = target_port_;
    if (address.port == 0 && workload.application_tunnel_port.value_or(0) != 0)
      address.port = query_.service_port;
    if (address.port == 0) return Usable::kNo;
    if (workload.network != query_.network)
      return workload.network_gateway ? Usable::kUnsupported : Usable::kNo;
    const auto ip = chooseAddress(workload, query_.prefer_v4, service_.ip_families);
    if (!ip)
      return workload.addresses.empty() && !workload.hostname.empty() ? Usable::kUnsupported : Usable::kNo;
    address.ip = *ip;
    const auto& exclude = query_.exclude_uids;
    return std::find(exclude.begin(), exclude.end(), workload.uid) == exclude.end() ? Usable::kYes
                                                                                    : Usable::kNo;
  }

  // Two different usable endpoints in a few draws; false if luck fails.
  bool draw() {
    size_t found = 0;
    for (int i = 0; i < kDraws; ++i) {
      const Endpoint& endpoint = entry_.endpoints[randomBelow(entry_.endpoints.size())];
      if (found == 1 && drawn_[0].endpoint == &endpoint) continue;
      SocketAddress address;
      if (usable(endpoint, address) != Usable::kYes) continue;
      drawn_[found++] = {&endpoint, address};
      if (found == 2) return true;
    }
    return false;
  }

  BalanceChoice scan() {
    thread_local std::vector<Candidate> nearest;  // keeps its memory from call to call
    nearest.clear();
    BalanceChoice choice;
    int best_rank = -1;
    size_t eligible = 0;
    uint64_t total = 0;
    for (const Endpoint& endpoint : entry_.endpoints) {
      SocketAddress address;
      const Usable verdict = usable(endpoint, address);
      if (verdict == Usable::kUnsupported) choice.unsupported = true;
      if (verdict != Usable::kYes) continue;
      const int rank = rankOf(service_, query_.source, endpoint.workload(), query_.network);
      if (rank < 0) continue;
      ++eligible;
      if (rank < best_rank) continue;
      if (rank > best_rank) {
        nearest.clear();
        total = 0;
        best_rank = rank;
      }
      nearest.push_back({&endpoint, address});
      total += endpoint.workload().capacity;
    }
    if (nearest.empty()) return choice;
    const size_t first = pick(nearest, total, nearest.size());
    if (nearest.size() > 1) {
      const size_t second = pick(nearest, total - nearest[first].endpoint->workload().capacity, first);
      choice = better(nearest[first], nearest[second]);
    } else {
      choice = chosen(nearest[first]);
    }
    choice.can_retry = eligible > 1;
    return choice;
  }

  // Index of one of `candidates` but `skip`, as likely as its capacity; `total` is the sum over those
  // eligible.
  static size_t pick(const std::vector<Candidate>& candidates, uint64_t total, size_t skip) {
    uint64_t rest = randomBelow(total);
    for (size_t i = 0;; ++i) {
      if (i == skip) continue;
      const uint64_t weight = candidates[i].endpoint->workload().capacity;
      if (rest < weight) return i;
      rest -= weight;
    }
  }

  static BalanceChoice chosen(const Candidate& candidate) {
    BalanceChoice choice;
    choice.endpoint = candidate.endpoint->owner;
    choice.address = candidate.address;
    return choice;
  }

  // The one with fewer connections for its capacity, counting the one to come.
  static BalanceChoice better(const Candidate& a, const Candidate& b) {
    const auto busy = [](const Candidate& c, const Candidate& other) {
      const auto& load = c.endpoint->workload().load;
      const int64_t connections = load ? std::max(0, load->connections.load(std::memory_order_relaxed)) : 0;
      return static_cast<uint64_t>(connections + 1) * other.endpoint->workload().capacity;
    };
    BalanceChoice choice = chosen(busy(b, a) < busy(a, b) ? b : a);
    choice.can_retry = true;
    return choice;
  }

  const ServiceEntry& entry_;
  const Service& service_;
  const BalanceQuery& query_;
  uint16_t target_port_ = 0;
  std::array<Candidate, 2> drawn_{};
};

}  // namespace

uint64_t randomBelow(uint64_t bound) {
  // splitmix64: balancing needs speed and spread, not secrecy.
  thread_local uint64_t state = [] {
    std::random_device device;
    return (static_cast<uint64_t>(device()) << 32) | device();
  }();
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(z) * bound) >> 64);
}

std::optional<IpAddress> chooseAddress(const Workload& workload, bool prefer_v4, uint8_t ip_families) {
  constexpr uint8_t kV4Only = 1, kV6Only = 2;
  std::optional<IpAddress> other;
  for (const IpAddress& ip : workload.addresses) {
    if ((ip_families == kV4Only && !ip.v4) || (ip_families == kV6Only && ip.v4)) continue;
    if (ip.v4 == prefer_v4) return ip;
    if (!other) other = ip;
  }
  return other;
}

BalanceChoice chooseEndpoint(const ServiceEntry& service, const BalanceQuery& query) {
  return Chooser(service, query).choose();
}

}  // namespace ebbtide
