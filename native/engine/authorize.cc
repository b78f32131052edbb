// Evaluates policies as ztunnel does (rules ORed, clauses ANDed, matches ORed, attributes ANDed), stricter in
// two places: a policy that the workload names but nobody sent refuses, and what could not be understood
// never widens access.
#include "authorize.h"

#include <algorithm>
#include <cstring>

namespace ebbtide {

namespace {

bool textMatches(const StringMatch& match, std::string_view text) {
  switch (match.kind) {
    case StringMatch::Kind::kExact:
      return text == match.value;
    case StringMatch::Kind::kPrefix:
      return text.starts_with(match.value);
    case StringMatch::Kind::kSuffix:
      return text.ends_with(match.value);
    case StringMatch::Kind::kPresence:
      return !text.empty();
  }
  return false;
}

// An empty positive list asks nothing, an empty negative list forbids nothing.
template <typename T, typename Predicate>
bool holds(const Attribute<T>& attribute, Predicate matches) {
  const auto& [any_of, none_of] = attribute;
  return (any_of.empty() || std::any_of(any_of.begin(), any_of.end(), matches)) &&
         std::none_of(none_of.begin(), none_of.end(), matches);
}

bool matchHolds(const PolicyMatch& match, Policy::Action action, const PolicySubject& subject) {
  if (match.malformed) return action == Policy::Action::kDeny;
  // A match that asks nothing matches nothing, unlike a clause or a rule.
  if (match.namespaces.empty() && match.principals.empty() && match.source_ips.empty() &&
      match.destination_ips.empty() && match.destination_ports.empty() && match.service_accounts.empty()) {
    return false;
  }
  const Identity* peer = subject.peer;
  // A plaintext client has the namespace "", which an empty prefix or suffix matches; it has no principal at
  // all.
  const std::string_view peer_ns = peer != nullptr ? std::string_view(peer->ns) : std::string_view();
  return holds(match.namespaces, [&](const StringMatch& m) { return textMatches(m, peer_ns); }) &&
         holds(match.principals,
               [&](const StringMatch& m) { return peer != nullptr && textMatches(m, subject.principal); }) &&
         holds(match.service_accounts,
               [&](const ServiceAccountMatch& m) {
                 return peer != nullptr && peer->ns == m.ns && peer->service_account == m.service_account;
               }) &&
         holds(match.source_ips, [&](const Cidr& c) { return cidrContains(c, subject.source_ip); }) &&
         holds(match.destination_ips,
               [&](const Cidr& c) { return cidrContains(c, subject.destination.ip); }) &&
         holds(match.destination_ports, [&](uint16_t port) { return port == subject.destination.port; });
}

bool byKey(const PolicyPtr& a, const PolicyPtr& b) {
  return a->ns != b->ns ? a->ns < b->ns : a->name < b->name;
}

// Calls `visit` for each known policy that applies to the workload, until it returns true; that policy is
// returned.
template <typename F>
const Policy* findPolicy(const PolicySet& policies, const Workload& workload, F visit) {
  for (const PolicyPtr& policy : policies.global) {
    if (visit(*policy)) return policy.get();
  }
  if (const auto found = policies.by_namespace.find(workload.ns); found != policies.by_namespace.end()) {
    for (const PolicyPtr& policy : found->second) {
      if (visit(*policy)) return policy.get();
    }
  }
  for (const std::string& key : workload.authorization_policies) {
    const auto found = policies.by_key.find(key);
    if (found != policies.by_key.end() && visit(*found->second)) return found->second.get();
  }
  return nullptr;
}

AuthorizationVerdict refusal(Reason reason, std::string policy) {
  AuthorizationVerdict verdict;
  verdict.reason = reason;
  verdict.policy = std::move(policy);
  return verdict;
}

// What dry-run policies would have changed, had they been enforced.
void noteDryRun(const PolicySet& policies, const Workload& workload, const PolicySubject& subject,
                bool enforced_allow, AuthorizationVerdict& verdict) {
  if (!verdict.allowed && verdict.reason != Reason::kPolicyNoAllow) return;
  std::vector<std::string> denying, matching_allow, idle_allow;
  findPolicy(policies, workload, [&](const Policy& policy) {
    if (!policy.dry_run) return false;
    const bool matches = policyMatches(policy, subject);
    if (policy.action == Policy::Action::kDeny) {
      if (matches) denying.push_back(policy.key());
    } else {
      (matches ? matching_allow : idle_allow).push_back(policy.key());
    }
    return false;
  });
  if (!verdict.allowed) {
    if (denying.empty()) verdict.dry_run = std::move(matching_allow);
    return;
  }
  verdict.dry_run = std::move(denying);
  // The first ALLOW of a workload refuses everybody whom it does not name.
  if (!enforced_allow && matching_allow.empty()) {
    verdict.dry_run.insert(verdict.dry_run.end(), idle_allow.begin(), idle_allow.end());
  }
}

}  // namespace

bool cidrContains(const Cidr& cidr, const IpAddress& ip) {
  if (cidr.ip.v4 != ip.v4 || cidr.length > (ip.v4 ? 32 : 128)) return false;
  const size_t bytes = cidr.length / 8;
  if (std::memcmp(cidr.ip.bytes.data(), ip.bytes.data(), bytes) != 0) return false;
  const unsigned rest = cidr.length % 8;
  return rest == 0 || ((cidr.ip.bytes[bytes] ^ ip.bytes[bytes]) >> (8 - rest)) == 0;
}

bool policyMatches(const Policy& policy, const PolicySubject& subject) {
  const auto match = [&](const PolicyMatch& m) { return matchHolds(m, policy.action, subject); };
  // A clause without matches, and a rule without clauses, ask nothing and match; a policy without rules
  // matches nothing.
  const auto clause = [&](const std::vector<PolicyMatch>& c) {
    return c.empty() || std::any_of(c.begin(), c.end(), match);
  };
  return std::any_of(policy.rules.begin(), policy.rules.end(),
                     [&](const auto& rule) { return std::all_of(rule.begin(), rule.end(), clause); });
}

std::shared_ptr<const PolicySet> PolicySet::with(std::vector<PolicyPtr> put,
                                                 const std::vector<std::string>& removed) const {
  auto next = std::make_shared<PolicySet>();
  next->by_key = by_key;
  for (PolicyPtr& policy : put) {
    std::string key = policy->key();
    next->by_key.insert_or_assign(std::move(key), std::move(policy));
  }
  for (const std::string& key : removed) next->by_key.erase(key);
  for (const auto& [key, policy] : next->by_key) {
    if (policy->scope == Policy::Scope::kGlobal) next->global.push_back(policy);
    if (policy->scope == Policy::Scope::kNamespace) next->by_namespace[policy->ns].push_back(policy);
  }
  std::sort(next->global.begin(), next->global.end(), byKey);
  for (auto& [ns, list] : next->by_namespace) std::sort(list.begin(), list.end(), byKey);
  return next;
}

AuthorizationVerdict evaluatePolicies(const PolicySet& policies, const Workload& workload,
                                      const PolicySubject& subject) {
  const Policy* denying = findPolicy(policies, workload, [&](const Policy& policy) {
    return policy.action == Policy::Action::kDeny && !policy.dry_run && policyMatches(policy, subject);
  });
  if (denying != nullptr) return refusal(Reason::kPolicyDenied, denying->key());

  // It could be a DENY for all we know.
  for (const std::string& key : workload.authorization_policies) {
    if (!policies.by_key.contains(key)) return refusal(Reason::kPolicyUnknown, key);
  }

  bool any_allow = false;
  const Policy* allowing = findPolicy(policies, workload, [&](const Policy& policy) {
    if (policy.action != Policy::Action::kAllow || policy.dry_run) return false;
    any_allow = true;
    return policyMatches(policy, subject);
  });
  AuthorizationVerdict verdict;
  verdict.allowed = allowing != nullptr || !any_allow;
  verdict.reason = verdict.allowed ? Reason::kNone : Reason::kPolicyNoAllow;
  if (allowing != nullptr) verdict.policy = allowing->key();
  noteDryRun(policies, workload, subject, any_allow, verdict);
  return verdict;
}

}  // namespace ebbtide
