// The mesh as the control plane described it, and every decision that follows from it: where a connection
// goes, whether it is allowed. No sockets and no threads of its own: one writer (the JavaScript thread) calls
// apply(), any worker calls the const functions. Values handed out are immutable and stay valid while held.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model.h"
#include "reason.h"

namespace ebbtide {

using WorkloadPtr = std::shared_ptr<const Workload>;
using ServicePtr = std::shared_ptr<const Service>;
using PolicyPtr = std::shared_ptr<const Policy>;

// What changed; removals name keys (workload uid, service namespace/hostname, policy namespace/name).
struct StateDelta {
  std::vector<Workload> workloads;
  std::vector<Service> services;
  std::vector<Policy> policies;
  std::vector<std::string> removed_addresses;  // workload uids or service keys, as WDS mixes them
  std::vector<std::string> removed_policies;
};

struct StateConfig {
  std::string node_name;
  std::string network;
  std::string cluster_id;
};

// ---- outbound ----
struct OutboundQuery {
  WorkloadPtr source;
  SocketAddress destination;              // as the application dialled it
  std::vector<std::string> exclude_uids;  // endpoints that were tried and did not answer
};

struct OutboundRoute {
  enum class Kind : uint8_t { kHbone, kPlaintext, kRefused } kind = Kind::kRefused;
  Reason reason = Reason::kNone;                 // for kRefused
  SocketAddress next_hop;                        // where to open TCP: pod:15008, or the plaintext destination
  std::string authority;                         // :authority for kHbone
  std::vector<std::string> expected_identities;  // SPIFFE URIs, any of which the server may hold (kHbone)
  WorkloadPtr destination_workload;              // may be null: passthrough of an unknown destination
  ServicePtr destination_service;                // null unless dialled by a service address
  bool can_retry = false;                        // other endpoints exist that were not tried
};

// ---- inbound ----
struct InboundQuery {
  WorkloadPtr local;      // the pod's own workload
  IpAddress local_ip;     // address of the pod at which the tunnel arrived
  std::string authority;  // of CONNECT
  std::string forwarded;  // value of the forwarded header, "" if none (telemetry only)
};

struct InboundTarget {
  Reason reason = Reason::kNone;  // kNone: accepted
  int http_status = 200;          // 400, 503 when refused
  SocketAddress application;      // pod IP and final port
  ServicePtr service;             // for telemetry
  bool send_proxy_header = false;
  SocketAddress proxy_destination;  // what a PROXY header names as destination
};

// ---- authorization ----
struct AuthorizationQuery {
  std::optional<Identity> peer;  // from the peer certificate only
  IpAddress source_ip;
  SocketAddress destination;  // pod IP and final port
  // The destination workload. Its policy list is looked up anew by uid at each evaluation, so that a change
  // of the workload's own list is seen by connections that are open.
  WorkloadPtr workload;
};

struct AuthorizationVerdict {
  bool allowed = false;
  Reason reason = Reason::kPolicyNoAllow;  // kNone when allowed
  std::string policy;                      // namespace/name of the deciding policy, "" if none
  std::vector<std::string> dry_run;        // dry-run policies that would have decided otherwise
};

class State {
 public:
  explicit State(StateConfig config);
  ~State();

  // Writer thread. Returns true when policies, or any workload's list of policies, changed: then open inbound
  // connections have to be authorized again.
  bool apply(StateDelta delta);

  // The workload of a pod on this node, by what ZDS says of it (never by address); null if not received yet.
  WorkloadPtr localWorkload(const std::string& ns, const std::string& name, const std::string& sa) const;
  WorkloadPtr workloadByIp(const IpAddress& ip) const;
  WorkloadPtr workloadByUid(const std::string& uid) const;
  // Same uid, newest version; the given one if it is gone.
  WorkloadPtr refreshed(const WorkloadPtr& workload) const;

  OutboundRoute routeOutbound(const OutboundQuery& query) const;
  InboundTarget resolveInbound(const InboundQuery& query) const;
  AuthorizationVerdict authorize(const AuthorizationQuery& query) const;

  struct Counts {
    size_t workloads, services, policies;
  };
  Counts counts() const;

  struct Impl;  // state_index.h

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace ebbtide
