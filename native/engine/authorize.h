// L4 policy evaluation: what istio.security.Authorization means for one connection. Pure functions over
// immutable values.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model.h"
#include "state.h"

namespace ebbtide {

// All policies at one moment, found by each way that they can apply to a workload. Every list is sorted by
// key, so that the policy named in a verdict does not depend on the order of arrival.
struct PolicySet {
  std::unordered_map<std::string, PolicyPtr> by_key;  // namespace/name
  std::unordered_map<std::string, std::vector<PolicyPtr>> by_namespace;
  std::vector<PolicyPtr> global;

  // A copy with policies added or replaced, and others removed.
  std::shared_ptr<const PolicySet> with(std::vector<PolicyPtr> put,
                                        const std::vector<std::string>& removed) const;
};

// What a policy is asked about.
struct PolicySubject {
  const Identity* peer = nullptr;  // null: plaintext
  std::string principal;           // of `peer`, "" when plaintext
  IpAddress source_ip;
  SocketAddress destination;
};

bool policyMatches(const Policy& policy, const PolicySubject& subject);
bool cidrContains(const Cidr& cidr, const IpAddress& ip);

// `workload` is the newest version of the destination.
AuthorizationVerdict evaluatePolicies(const PolicySet& policies, const Workload& workload,
                                      const PolicySubject& subject);

}  // namespace ebbtide
