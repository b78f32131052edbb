// State as its callers see it: applying what the control plane sent, and lookups of workloads.
#include "state.h"

#include <mutex>
#include <utility>

#include "state_index.h"

namespace ebbtide {

namespace {

// How many entries change under one hold of the lock. A first push of 50,000 workloads must not stop the
// workers for as long as it takes.
constexpr size_t kEntriesPerHold = 128;

// Calls `change(i)` for each index with the lock held, letting readers in now and then.
template <typename F>
void changeInSteps(std::shared_mutex& mutex, size_t count, F change) {
  for (size_t i = 0; i < count;) {
    const std::unique_lock lock(mutex);
    for (size_t n = 0; n < kEntriesPerHold && i < count; ++n, ++i) change(i);
  }
}

}  // namespace

State::State(StateConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
State::~State() = default;

// The order matters to readers who look between two holds of the lock: a policy is there before a workload
// names it, and goes after the workload stopped naming it.
bool State::apply(StateDelta delta) {
  bool authorize_again = false;
  Impl::Garbage old;

  if (!delta.policies.empty()) {
    authorize_again = true;
    std::vector<PolicyPtr> put;
    put.reserve(delta.policies.size());
    for (Policy& policy : delta.policies) put.push_back(std::make_shared<const Policy>(std::move(policy)));
    // Only this thread replaces the set, so reading it needs no lock.
    std::shared_ptr<const PolicySet> next = impl_->policies->with(std::move(put), {});
    const std::unique_lock lock(impl_->mutex);
    impl_->policies.swap(next);
  }

  std::vector<WorkloadPtr> workloads;
  workloads.reserve(delta.workloads.size());
  TextMap<std::shared_ptr<EndpointLoad>> fresh_loads;  // the same uid twice in one delta is one endpoint
  for (Workload& workload : delta.workloads) {
    const WorkloadEntry* known = impl_->findWorkload(workload.uid);
    if (known != nullptr) {
      workload.load = known->value->load;
    } else {
      auto& load = fresh_loads[workload.uid];
      if (!load) load = std::make_shared<EndpointLoad>();
      workload.load = load;
    }
    const Workload* before = known != nullptr ? known->value.get() : nullptr;
    const bool was_local = before != nullptr && impl_->isLocal(*before);
    if (was_local != impl_->isLocal(workload) ||
        (was_local &&
         (before->authorization_policies != workload.authorization_policies || before->ns != workload.ns))) {
      authorize_again = true;
    }
    workloads.push_back(std::make_shared<const Workload>(std::move(workload)));
  }
  std::vector<ServicePtr> services;
  services.reserve(delta.services.size());
  for (Service& service : delta.services)
    services.push_back(std::make_shared<const Service>(std::move(service)));

  changeInSteps(impl_->mutex, services.size(),
                [&](size_t i) { impl_->putService(std::move(services[i]), old); });
  changeInSteps(impl_->mutex, workloads.size(),
                [&](size_t i) { impl_->putWorkload(std::move(workloads[i]), old); });
  changeInSteps(impl_->mutex, delta.removed_addresses.size(), [&](size_t i) {
    const std::string& key = delta.removed_addresses[i];
    if (const WorkloadEntry* known = impl_->findWorkload(key)) {
      if (impl_->isLocal(*known->value)) authorize_again = true;
      impl_->removeWorkload(key, old);
    } else {
      impl_->removeService(key, old);
    }
  });

  if (!delta.removed_policies.empty()) {
    authorize_again = true;
    std::shared_ptr<const PolicySet> next = impl_->policies->with({}, delta.removed_policies);
    const std::unique_lock lock(impl_->mutex);
    impl_->policies.swap(next);
  }
  return authorize_again;
}

WorkloadPtr State::localWorkload(const std::string& ns, const std::string& name,
                                 const std::string& sa) const {
  const std::string key = ns + "/" + name + "/" + sa;
  const std::shared_lock lock(impl_->mutex);
  const auto found = impl_->local.find(key);
  return found == impl_->local.end() ? nullptr : found->second.front()->value;
}

WorkloadPtr State::workloadByIp(const IpAddress& ip) const {
  const std::shared_lock lock(impl_->mutex);
  const WorkloadEntry* entry = impl_->findWorkload(impl_->config.network, ip);
  return entry == nullptr ? nullptr : entry->value;
}

WorkloadPtr State::workloadByUid(const std::string& uid) const {
  const std::shared_lock lock(impl_->mutex);
  const WorkloadEntry* entry = impl_->findWorkload(uid);
  return entry == nullptr ? nullptr : entry->value;
}

WorkloadPtr State::refreshed(const WorkloadPtr& workload) const {
  if (!workload) return nullptr;
  WorkloadPtr newest = workloadByUid(workload->uid);
  return newest ? newest : workload;
}

AuthorizationVerdict State::authorize(const AuthorizationQuery& query) const {
  WorkloadPtr workload;
  std::shared_ptr<const PolicySet> policies;
  if (query.workload) {
    const std::shared_lock lock(impl_->mutex);
    if (const WorkloadEntry* entry = impl_->findWorkload(query.workload->uid)) workload = entry->value;
    policies = impl_->policies;
  }
  if (!workload) {
    AuthorizationVerdict verdict;
    verdict.reason = Reason::kUnknownLocalWorkload;
    return verdict;
  }
  PolicySubject subject;
  if (query.peer) {
    subject.peer = &*query.peer;
    subject.principal = query.peer->principal();
  }
  subject.source_ip = query.source_ip;
  subject.destination = query.destination;
  return evaluatePolicies(*policies, *workload, subject);
}

State::Counts State::counts() const {
  const std::shared_lock lock(impl_->mutex);
  return {impl_->workloads.size(), impl_->known_services, impl_->policies->by_key.size()};
}

}  // namespace ebbtide
