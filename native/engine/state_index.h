// The indexes under State: who has which address, which service has which endpoints. Private to the state*,
// route* and authorize* files. One writer thread; readers hold `mutex` shared while they look, and copy out
// what they keep.
#pragma once

#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "authorize.h"
#include "model.h"
#include "state.h"

namespace ebbtide {

struct IpHash {
  size_t operator()(const IpAddress& ip) const noexcept;
};

// Lets maps keyed by std::string be asked with a std::string_view.
struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};
template <typename T>
using TextMap = std::unordered_map<std::string, T, TextHash, std::equal_to<>>;

struct ServiceEntry;

// Where in ServiceEntry::endpoints a workload stands; one for each of Workload::services, in the same order.
struct Membership {
  ServiceEntry* service;
  uint32_t position;
};

struct WorkloadEntry {
  WorkloadPtr value;
  std::vector<Membership> memberships;
};

struct Endpoint {
  WorkloadEntry* owner;
  uint32_t slot;  // in Workload::services and WorkloadEntry::memberships

  const Workload& workload() const { return *owner->value; }
  const std::vector<PortMapping>& ports() const { return owner->value->services[slot].second; }
};

// Exists as long as the service is known or a workload says that it belongs to it, whichever comes first.
struct ServiceEntry {
  std::string key;
  ServicePtr value;  // null: not received yet
  std::vector<Endpoint> endpoints;
  uint32_t unequal = 0;  // endpoints whose capacity is not 1
};

struct NetworkIndex {
  // The best candidate first; more than one when several workloads claim an address.
  std::unordered_map<IpAddress, std::vector<WorkloadEntry*>, IpHash> workloads;
  std::unordered_map<IpAddress, std::vector<ServiceEntry*>, IpHash> vips;
  // By {is IPv4, prefix length}, then by the masked address.
  std::map<std::pair<bool, uint8_t>, std::unordered_map<IpAddress, std::vector<ServiceEntry*>, IpHash>>
      vip_ranges;

  bool empty() const { return workloads.empty() && vips.empty() && vip_ranges.empty(); }
};

// A waypoint or gateway reference, looked up: one of the two, or neither.
struct GatewayTarget {
  const WorkloadEntry* workload = nullptr;
  const ServiceEntry* service = nullptr;
};

struct State::Impl {
  explicit Impl(StateConfig config) : config(std::move(config)), policies(std::make_shared<PolicySet>()) {}

  // ---- writer, mutex held exclusively. What is replaced goes to `old`, so that it dies after the lock. ----
  struct Garbage {
    std::vector<WorkloadPtr> workloads;
    std::vector<ServicePtr> services;
  };
  void putWorkload(WorkloadPtr workload, Garbage& old);
  bool removeWorkload(std::string_view uid, Garbage& old);
  void putService(ServicePtr service, Garbage& old);
  bool removeService(std::string_view key, Garbage& old);

  // ---- readers, mutex held shared (or the writer without it) ----
  bool isLocal(const Workload& workload) const {
    return config.node_name.empty() || workload.node == config.node_name;
  }
  const WorkloadEntry* findWorkload(std::string_view uid) const;
  const WorkloadEntry* findWorkload(std::string_view network, const IpAddress& ip) const;
  // The service that has this address as VIP (or in a range of VIPs) as a client in `client_ns` sees it.
  const ServiceEntry* findServiceByVip(std::string_view network, const IpAddress& ip,
                                       std::string_view client_ns) const;
  const ServiceEntry* findServiceByHost(std::string_view hostname, std::string_view client_ns) const;
  const ServiceEntry* findService(std::string_view key) const;
  GatewayTarget findGateway(const GatewayAddress& gateway, std::string_view client_ns) const;

  const StateConfig config;
  mutable std::shared_mutex mutex;
  TextMap<std::unique_ptr<WorkloadEntry>> workloads;           // by uid
  TextMap<std::unique_ptr<ServiceEntry>> services;             // by namespace/hostname
  size_t known_services = 0;                                   // of `services`, those received
  TextMap<NetworkIndex> networks;                              // by network name
  TextMap<std::vector<WorkloadEntry*>> local;                  // by ns/name/sa, workloads of this node
  TextMap<std::vector<WorkloadEntry*>> workloads_by_hostname;  // by ns/hostname
  TextMap<std::vector<ServiceEntry*>> services_by_hostname;    // by hostname, of all namespaces
  std::shared_ptr<const PolicySet> policies;                   // replaced whole

 private:
  ServiceEntry& serviceEntry(const std::string& key);
  void forgetIfUnused(ServiceEntry* entry);
  void join(WorkloadEntry* entry);
  void leave(WorkloadEntry* entry);
  void indexService(ServiceEntry* entry);
  void unindexService(ServiceEntry* entry);
};

// The first `length` bits; the rest zero.
IpAddress masked(const IpAddress& ip, uint8_t length);
uint8_t fullLength(const IpAddress& ip);

}  // namespace ebbtide
