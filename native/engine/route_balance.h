// Picks one endpoint of a service: who can take the connection at all, who is near, who is least busy. The
// caller holds the state's lock.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "state_index.h"

namespace ebbtide {

// Evenly distributed in [0, bound); bound > 0. Any thread.
uint64_t randomBelow(uint64_t bound);

// The address to use for a workload whose peer prefers one family; none if the workload has no address that
// `ip_families` (IPFamilies of WDS) permits.
std::optional<IpAddress> chooseAddress(const Workload& workload, bool prefer_v4, uint8_t ip_families);

struct BalanceQuery {
  const Workload& source;
  std::string_view network;  // ours
  uint16_t service_port;
  bool prefer_v4;  // family of the address that was dialled
  bool waypoint;   // the service is a waypoint: its HBONE port may be absent from the service
  const std::vector<std::string>& exclude_uids;
};

struct BalanceChoice {
  const WorkloadEntry* endpoint = nullptr;  // null: nobody can take it
  SocketAddress address;                    // of the endpoint, with the target port
  bool can_retry = false;                   // another endpoint could be tried
  bool unsupported = false;  // for null: there are endpoints, on other networks or without address
};

BalanceChoice chooseEndpoint(const ServiceEntry& service, const BalanceQuery& query);

}  // namespace ebbtide
