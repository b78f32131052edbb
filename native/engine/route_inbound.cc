// What a CONNECT that arrived at a pod may reach: this pod, and nothing else.
#include <algorithm>

#include "route_authority.h"
#include "state.h"
#include "state_index.h"

namespace ebbtide {

namespace {

constexpr int kBadRequestStatus = 400, kUnavailableStatus = 503;

InboundTarget refused(Reason reason, int status) {
  InboundTarget target;
  target.reason = reason;
  target.http_status = status;
  return target;
}

bool isMeshPort(uint16_t port) {
  return port == 15001 || port == 15006 || port == 15008;
}

// The workload's own port mapping in the service `key`; null if it is no endpoint of it.
const std::vector<PortMapping>* portsIn(const Workload& workload, std::string_view key) {
  for (const auto& [service, ports] : workload.services) {
    if (service == key) return &ports;
  }
  return nullptr;
}

uint16_t targetPort(const std::vector<PortMapping>& ports, uint16_t service_port) {
  for (const PortMapping& port : ports) {
    if (port.service_port == service_port) return port.target_port;
  }
  return 0;
}

class Receiver {
 public:
  Receiver(const State::Impl& state, const Workload& local, const InboundQuery& query)
      : state_(state), local_(local), query_(query) {}

  InboundTarget resolve() const {
    const auto authority = parseAuthority(query_.authority);
    if (!authority) return refused(Reason::kBadRequest, kBadRequestStatus);
    InboundTarget target;
    // The host of the authority only says which pod is meant; what is dialled is always this pod.
    target.application.ip = query_.local_ip;
    target.proxy_destination = {authority->ip.value_or(query_.local_ip), authority->port};
    target.send_proxy_header = local_.application_tunnel_proxy;
    if (authority->ip) {
      if (!mayReceive(*authority->ip)) return refused(Reason::kAuthorityNotLocal, kBadRequestStatus);
      target.application.port = authority->port;
    } else {
      const Reason reason = resolveHostname(*authority, target);
      if (reason != Reason::kNone) return refused(reason, kUnavailableStatus);
    }
    if (isMeshPort(target.application.port)) return refused(Reason::kIllegalPort, kUnavailableStatus);
    if (local_.application_tunnel_port.value_or(0) != 0)
      target.application.port = *local_.application_tunnel_port;
    if (!target.service) target.service = likelyService(target.application.port);
    return target;
  }

 private:
  // This pod's address, or an address for which this pod is the waypoint.
  bool mayReceive(const IpAddress& ip) const {
    if (ip == query_.local_ip || local_.has_application_tunnel) return true;
    const std::string& network = state_.config.network;
    const GatewayAddress* waypoint = nullptr;
    if (const WorkloadEntry* workload = state_.findWorkload(network, ip)) {
      if (workload->value->waypoint) waypoint = &*workload->value->waypoint;
    } else if (const ServiceEntry* service = state_.findServiceByVip(network, ip, local_.ns)) {
      if (service->value->waypoint) waypoint = &*service->value->waypoint;
    }
    return waypoint != nullptr && isWaypoint(*waypoint);
  }

  // Whether the reference means this pod.
  bool isWaypoint(const GatewayAddress& waypoint) const {
    const GatewayTarget target = state_.findGateway(waypoint, local_.ns);
    if (target.service != nullptr) return portsIn(local_, target.service->key) != nullptr;
    if (target.workload == nullptr) return false;
    const auto& addresses = target.workload->value->addresses;
    return std::find(addresses.begin(), addresses.end(), query_.local_ip) != addresses.end();
  }

  // Only names of services that have this pod as endpoint. ztunnel takes any service that it knows; nobody
  // has a reason to send those here, and a pod that is no endpoint has no port in them.
  Reason resolveHostname(const Authority& authority, InboundTarget& target) const {
    const ServiceEntry* service = state_.findServiceByHost(authority.hostname, local_.ns);
    if (service == nullptr) return Reason::kAuthorityNotLocal;
    const auto* ports = portsIn(local_, service->key);
    const bool waypoint =
        local_.has_application_tunnel || (service->value->waypoint && isWaypoint(*service->value->waypoint));
    if (ports == nullptr && !waypoint) return Reason::kAuthorityNotLocal;
    if (ports != nullptr) target.application.port = targetPort(*ports, authority.port);
    if (target.application.port == 0)
      target.application.port = targetPort(service->value->ports, authority.port);
    if (target.application.port == 0) return Reason::kNoHealthyEndpoint;
    target.service = service->value;
    if (!target.send_proxy_header) return Reason::kNone;
    const ServiceVip* vip = headerVip(*service->value);
    if (vip == nullptr) return Reason::kNoHealthyEndpoint;
    target.proxy_destination.ip = vip->ip;
    return Reason::kNone;
  }

  // Our network's first, then IPv4.
  const ServiceVip* headerVip(const Service& service) const {
    const auto rank = [&](const ServiceVip& vip) {
      return (vip.network == state_.config.network ? 2 : 0) + (vip.ip.v4 ? 1 : 0);
    };
    const auto best = std::max_element(service.vips.begin(), service.vips.end(),
                                       [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    return best == service.vips.end() ? nullptr : &*best;
  }

  // For telemetry: what the client says it dialled if this pod belongs to it, else the only service that it
  // can be.
  ServicePtr likelyService(uint16_t port) const {
    const std::string_view host = forwardedHost(query_.forwarded);
    ServicePtr by_port, only;
    size_t known = 0, with_port = 0;
    for (const auto& [key, ports] : local_.services) {
      const ServiceEntry* entry = state_.findService(key);
      if (entry == nullptr) continue;
      if (!host.empty() && entry->value->hostname == host) return entry->value;
      ++known;
      only = entry->value;
      const auto& declared = entry->value->ports;
      const auto leads = [&](const PortMapping& p) { return p.target_port == port; };
      if (std::any_of(ports.begin(), ports.end(), leads) ||
          std::any_of(declared.begin(), declared.end(), leads)) {
        ++with_port;
        by_port = entry->value;
      }
    }
    if (known == 1) return only;
    return with_port == 1 ? by_port : nullptr;
  }

  const State::Impl& state_;
  const Workload& local_;
  const InboundQuery& query_;
};

}  // namespace

InboundTarget State::resolveInbound(const InboundQuery& query) const {
  const std::shared_lock lock(impl_->mutex);
  const WorkloadEntry* local = query.local ? impl_->findWorkload(query.local->uid) : nullptr;
  if (local == nullptr) return refused(Reason::kUnknownLocalWorkload, kUnavailableStatus);
  return Receiver(*impl_, *local->value, query).resolve();
}

}  // namespace ebbtide
