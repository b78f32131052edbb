// Where a connection that an application opens goes: service, waypoint, workload, or on as it is.
#include <algorithm>

#include "route_balance.h"
#include "state.h"
#include "state_index.h"

namespace ebbtide {

namespace {

constexpr uint16_t kOutboundPort = 15001, kPlaintextPort = 15006, kHbonePort = 15008;

OutboundRoute refused(Reason reason) {
  OutboundRoute route;
  route.reason = reason;
  return route;
}

OutboundRoute refused(const BalanceChoice& nobody) {
  return refused(nobody.unsupported ? Reason::kUnsupportedDestination : Reason::kNoHealthyEndpoint);
}

bool isUnspecified(const IpAddress& ip) {
  return std::all_of(ip.bytes.begin(), ip.bytes.end(), [](uint8_t byte) { return byte == 0; });
}

// Loopback is never captured on purpose, so seeing it means that the original destination was not found.
bool loops(const SocketAddress& destination) {
  if (destination.ip.isLoopback()) return true;
  const bool own_port = destination.port == kOutboundPort || destination.port == kPlaintextPort ||
                        destination.port == kHbonePort;
  return own_port && isUnspecified(destination.ip);
}

// Whom the server may prove to be: the workload, or what its service allows besides.
void expect(OutboundRoute& route, const Workload& workload, const Service* service) {
  route.expected_identities.push_back(workload.identity().uri());
  if (service == nullptr) return;
  for (const std::string& name : service->subject_alt_names) {
    if (Identity::parse(name)) route.expected_identities.push_back(name);
  }
}

class Router {
 public:
  Router(const State::Impl& state, const OutboundQuery& query)
      : state_(state), query_(query), source_(*query.source), destination_(query.destination) {}

  OutboundRoute route() const {
    const std::string& network = state_.config.network;
    const ServiceEntry* service = state_.findServiceByVip(network, destination_.ip, source_.ns);
    const WorkloadEntry* workload = state_.findWorkload(network, destination_.ip);
    // Where a range of VIPs holds a workload's own address, the workload is what was meant, so no service
    // waypoint.
    if (service != nullptr && workload == nullptr) {
      const GatewayAddress* waypoint = waypointOf(*service->value);
      if (waypoint != nullptr && !isThisWaypoint(*waypoint)) {
        OutboundRoute route = toWaypoint(*waypoint);
        route.destination_service = service->value;
        return route;
      }
    }
    if (service != nullptr && service->value->lb_mode != LbMode::kPassthrough) {
      OutboundRoute route = toService(*service);
      route.destination_service = service->value;
      return route;
    }
    OutboundRoute route = workload != nullptr ? toWorkload(*workload) : passthrough();
    if (service != nullptr) route.destination_service = service->value;
    return route;
  }

 private:
  OutboundRoute passthrough() const {
    OutboundRoute route;
    route.kind = OutboundRoute::Kind::kPlaintext;
    route.next_hop = destination_;
    return route;
  }

  OutboundRoute toService(const ServiceEntry& service) const {
    const BalanceChoice choice = balance(service, destination_.port, false);
    if (choice.endpoint == nullptr) return refused(choice);
    OutboundRoute route = toEndpoint(*choice.endpoint, choice.address, service.value.get());
    route.can_retry = choice.can_retry;
    return route;
  }

  OutboundRoute toWorkload(const WorkloadEntry& workload) const {
    if (workload.value->waypoint && !isThisWaypoint(*workload.value->waypoint)) {
      return toWaypoint(*workload.value->waypoint);
    }
    return toEndpoint(workload, destination_, nullptr);
  }

  OutboundRoute toEndpoint(const WorkloadEntry& entry, const SocketAddress& address,
                           const Service* service) const {
    const Workload& workload = *entry.value;
    OutboundRoute route;
    route.destination_workload = entry.value;
    // A pod that reaches itself through its service stays within its own namespace, as when it dials its own
    // address: capture leaves such connections alone, so no HBONE listener would get them.
    if (workload.protocol != TunnelProtocol::kHbone || workload.uid == source_.uid) {
      route.kind = OutboundRoute::Kind::kPlaintext;
      route.next_hop = address;
      return route;
    }
    route.kind = OutboundRoute::Kind::kHbone;
    route.next_hop = {address.ip, kHbonePort};
    route.authority = address.toString();
    expect(route, workload, service);
    return route;
  }

  // One of the weighted ones as likely as its weight; the single one where none has weight.
  static const GatewayAddress* waypointOf(const Service& service) {
    uint64_t total = 0;
    for (const auto& [gateway, weight] : service.weighted_waypoints) total += weight;
    if (total == 0) return service.waypoint ? &*service.waypoint : nullptr;
    uint64_t rest = randomBelow(total);
    for (const auto& [gateway, weight] : service.weighted_waypoints) {
      if (rest < weight) return &gateway;
      rest -= weight;
    }
    return nullptr;
  }

  // A waypoint's own traffic does not go through it again: same identity, and one of its addresses.
  bool isThisWaypoint(const GatewayAddress& gateway) const {
    const auto same = [&](const Workload& workload) {
      return workload.network == source_.network && workload.identity() == source_.identity() &&
             std::any_of(workload.addresses.begin(), workload.addresses.end(), [&](const IpAddress& ip) {
               return std::find(source_.addresses.begin(), source_.addresses.end(), ip) !=
                      source_.addresses.end();
             });
    };
    const GatewayTarget target = state_.findGateway(gateway, source_.ns);
    if (target.workload != nullptr) return same(*target.workload->value);
    if (target.service == nullptr) return false;
    const auto& endpoints = target.service->endpoints;
    return std::any_of(endpoints.begin(), endpoints.end(),
                       [&](const Endpoint& e) { return same(e.workload()); });
  }

  // HBONE to the waypoint, which gets the destination untranslated.
  OutboundRoute toWaypoint(const GatewayAddress& gateway) const {
    const GatewayTarget target = state_.findGateway(gateway, source_.ns);
    OutboundRoute route;
    route.kind = OutboundRoute::Kind::kHbone;
    route.authority = destination_.toString();
    if (target.service != nullptr) {
      const BalanceChoice choice = balance(*target.service, gateway.hbone_mtls_port, true);
      if (choice.endpoint == nullptr) return refused(choice);
      route.next_hop = choice.address;
      route.destination_workload = choice.endpoint->value;
      route.can_retry = choice.can_retry;
      expect(route, *choice.endpoint->value, target.service->value.get());
      return route;
    }
    if (target.workload == nullptr || gateway.hbone_mtls_port == 0)
      return refused(Reason::kNoHealthyEndpoint);
    const Workload& workload = *target.workload->value;
    const auto ip = chooseAddress(workload, destination_.ip.v4, 0);
    if (workload.network != state_.config.network || !ip) return refused(Reason::kUnsupportedDestination);
    route.next_hop = {*ip, gateway.hbone_mtls_port};
    route.destination_workload = target.workload->value;
    expect(route, workload, nullptr);
    return route;
  }

  BalanceChoice balance(const ServiceEntry& service, uint16_t port, bool waypoint) const {
    return chooseEndpoint(
        service, {source_, state_.config.network, port, destination_.ip.v4, waypoint, query_.exclude_uids});
  }

  const State::Impl& state_;
  const OutboundQuery& query_;
  const Workload& source_;
  const SocketAddress& destination_;
};

}  // namespace

OutboundRoute State::routeOutbound(const OutboundQuery& query) const {
  if (!query.source) return refused(Reason::kUnknownLocalWorkload);
  if (loops(query.destination)) return refused(Reason::kLoop);
  const std::shared_lock lock(impl_->mutex);
  return Router(*impl_, query).route();
}

}  // namespace ebbtide
