// Keeps the indexes in step while workloads and services come, change and go in any order.
#include "state_index.h"

#include <algorithm>
#include <cstring>

namespace ebbtide {

namespace {

std::string localKey(std::string_view ns, std::string_view name, std::string_view sa) {
  std::string key;
  key.reserve(ns.size() + name.size() + sa.size() + 2);
  return key.append(ns).append("/").append(name).append("/").append(sa);
}

// Who gets an address (or a name) that several workloads claim: pods before entries that only describe an
// address, then those that speak HBONE; the smaller uid last of all, so that the order of arrival does not
// matter.
bool preferred(const WorkloadEntry* a, const WorkloadEntry* b) {
  const Workload& x = *a->value;
  const Workload& y = *b->value;
  const bool x_pod = x.uid.find("//Pod/") != std::string::npos,
             y_pod = y.uid.find("//Pod/") != std::string::npos;
  if (x_pod != y_pod) return x_pod;
  if (x.protocol != y.protocol) return x.protocol == TunnelProtocol::kHbone;
  return x.uid < y.uid;
}

void insertSorted(std::vector<WorkloadEntry*>& entries, WorkloadEntry* entry) {
  if (std::find(entries.begin(), entries.end(), entry) != entries.end()) return;
  entries.insert(std::upper_bound(entries.begin(), entries.end(), entry, preferred), entry);
}

void insertSorted(std::vector<ServiceEntry*>& entries, ServiceEntry* entry) {
  if (std::find(entries.begin(), entries.end(), entry) != entries.end()) return;
  const auto by_key = [](const ServiceEntry* a, const ServiceEntry* b) { return a->key < b->key; };
  entries.insert(std::upper_bound(entries.begin(), entries.end(), entry, by_key), entry);
}

// Takes `entry` out of the list at `key`, and the list out of the map when it was the last.
template <typename Map, typename Key, typename Entry>
void eraseFrom(Map& map, const Key& key, Entry* entry) {
  const auto found = map.find(key);
  if (found == map.end()) return;
  std::erase(found->second, entry);
  if (found->second.empty()) map.erase(found);
}

// NAMESPACE visibility hides a service from other namespaces.
bool visible(const Service& service, std::string_view client_ns) {
  return !service.namespace_visibility || service.ns == client_ns;
}

// Same namespace as the client, then canonical, then the first.
const ServiceEntry* bestFor(const std::vector<ServiceEntry*>& candidates, std::string_view client_ns) {
  const ServiceEntry* best = nullptr;
  const auto rank = [&](const ServiceEntry* e) {
    return (e->value->ns == client_ns ? 2 : 0) + (e->value->canonical ? 1 : 0);
  };
  for (const ServiceEntry* candidate : candidates) {
    if (!visible(*candidate->value, client_ns)) continue;
    if (best == nullptr || rank(candidate) > rank(best)) best = candidate;
  }
  return best;
}

}  // namespace

size_t IpHash::operator()(const IpAddress& ip) const noexcept {
  uint64_t halves[2];
  std::memcpy(halves, ip.bytes.data(), sizeof halves);
  uint64_t h = (halves[0] ^ (ip.v4 ? 0x9e3779b97f4a7c15u : 0)) * 0xbf58476d1ce4e5b9u;
  h = (h ^ (h >> 31) ^ halves[1]) * 0x94d049bb133111ebu;
  return h ^ (h >> 29);
}

uint8_t fullLength(const IpAddress& ip) {
  return ip.v4 ? 32 : 128;
}

IpAddress masked(const IpAddress& ip, uint8_t length) {
  IpAddress out = ip;
  for (size_t byte = 0; byte < out.bytes.size(); ++byte) {
    const int bits = static_cast<int>(length) - static_cast<int>(byte) * 8;
    if (bits >= 8) continue;
    out.bytes[byte] &= bits <= 0 ? 0 : static_cast<uint8_t>(0xff << (8 - bits));
  }
  return out;
}

ServiceEntry& State::Impl::serviceEntry(const std::string& key) {
  auto& slot = services[key];
  if (!slot) {
    slot = std::make_unique<ServiceEntry>();
    slot->key = key;
  }
  return *slot;
}

void State::Impl::forgetIfUnused(ServiceEntry* entry) {
  if (entry->value || !entry->endpoints.empty()) return;
  services.erase(services.find(entry->key));
}

void State::Impl::join(WorkloadEntry* entry) {
  const Workload& workload = *entry->value;
  if (!workload.host_network) {
    for (const IpAddress& ip : workload.addresses)
      insertSorted(networks[workload.network].workloads[ip], entry);
  }
  if (!workload.hostname.empty()) {
    insertSorted(workloads_by_hostname[workload.ns + "/" + workload.hostname], entry);
  }
  if (isLocal(workload)) {
    insertSorted(local[localKey(workload.ns, workload.name, workload.service_account)], entry);
  }
  entry->memberships.reserve(workload.services.size());
  for (uint32_t slot = 0; slot < workload.services.size(); ++slot) {
    ServiceEntry& service = serviceEntry(workload.services[slot].first);
    entry->memberships.push_back({&service, static_cast<uint32_t>(service.endpoints.size())});
    service.endpoints.push_back({entry, slot});
    if (workload.capacity != 1) ++service.unequal;
  }
}

void State::Impl::leave(WorkloadEntry* entry) {
  const Workload& workload = *entry->value;
  if (const auto network = networks.find(workload.network);
      network != networks.end() && !workload.host_network) {
    for (const IpAddress& ip : workload.addresses) eraseFrom(network->second.workloads, ip, entry);
    if (network->second.empty()) networks.erase(network);
  }
  if (!workload.hostname.empty())
    eraseFrom(workloads_by_hostname, workload.ns + "/" + workload.hostname, entry);
  if (isLocal(workload))
    eraseFrom(local, localKey(workload.ns, workload.name, workload.service_account), entry);
  for (const Membership& membership : entry->memberships) {
    std::vector<Endpoint>& endpoints = membership.service->endpoints;
    const Endpoint last = endpoints.back();
    endpoints[membership.position] = last;
    last.owner->memberships[last.slot].position = membership.position;
    endpoints.pop_back();
    if (workload.capacity != 1) --membership.service->unequal;
    forgetIfUnused(membership.service);
  }
  entry->memberships.clear();
}

void State::Impl::putWorkload(WorkloadPtr workload, Garbage& old) {
  auto& slot = workloads[workload->uid];
  if (slot) {
    leave(slot.get());
    old.workloads.push_back(std::move(slot->value));
  } else {
    slot = std::make_unique<WorkloadEntry>();
  }
  slot->value = std::move(workload);
  join(slot.get());
}

bool State::Impl::removeWorkload(std::string_view uid, Garbage& old) {
  const auto found = workloads.find(uid);
  if (found == workloads.end()) return false;
  leave(found->second.get());
  old.workloads.push_back(std::move(found->second->value));
  workloads.erase(found);
  return true;
}

void State::Impl::indexService(ServiceEntry* entry) {
  const Service& service = *entry->value;
  insertSorted(services_by_hostname[service.hostname], entry);
  for (const ServiceVip& vip : service.vips) {
    NetworkIndex& network = networks[vip.network];
    if (vip.prefix_length >= fullLength(vip.ip)) {
      insertSorted(network.vips[vip.ip], entry);
    } else {
      insertSorted(network.vip_ranges[{vip.ip.v4, vip.prefix_length}][masked(vip.ip, vip.prefix_length)],
                   entry);
    }
  }
}

void State::Impl::unindexService(ServiceEntry* entry) {
  const Service& service = *entry->value;
  eraseFrom(services_by_hostname, service.hostname, entry);
  for (const ServiceVip& vip : service.vips) {
    const auto network = networks.find(vip.network);
    if (network == networks.end()) continue;
    if (vip.prefix_length >= fullLength(vip.ip)) {
      eraseFrom(network->second.vips, vip.ip, entry);
    } else if (const auto range = network->second.vip_ranges.find({vip.ip.v4, vip.prefix_length});
               range != network->second.vip_ranges.end()) {
      eraseFrom(range->second, masked(vip.ip, vip.prefix_length), entry);
      if (range->second.empty()) network->second.vip_ranges.erase(range);
    }
    if (network->second.empty()) networks.erase(network);
  }
}

void State::Impl::putService(ServicePtr service, Garbage& old) {
  ServiceEntry& entry = serviceEntry(service->key());
  if (entry.value) {
    unindexService(&entry);
    old.services.push_back(std::move(entry.value));
  } else {
    ++known_services;
  }
  entry.value = std::move(service);
  indexService(&entry);
}

bool State::Impl::removeService(std::string_view key, Garbage& old) {
  const auto found = services.find(key);
  if (found == services.end() || !found->second->value) return false;
  ServiceEntry* entry = found->second.get();
  unindexService(entry);
  old.services.push_back(std::move(entry->value));
  entry->value = nullptr;
  --known_services;
  forgetIfUnused(entry);
  return true;
}

const WorkloadEntry* State::Impl::findWorkload(std::string_view uid) const {
  const auto found = workloads.find(uid);
  return found == workloads.end() ? nullptr : found->second.get();
}

const WorkloadEntry* State::Impl::findWorkload(std::string_view network, const IpAddress& ip) const {
  const auto index = networks.find(network);
  if (index == networks.end()) return nullptr;
  const auto found = index->second.workloads.find(ip);
  return found == index->second.workloads.end() ? nullptr : found->second.front();
}

const ServiceEntry* State::Impl::findServiceByVip(std::string_view network, const IpAddress& ip,
                                                  std::string_view client_ns) const {
  const auto index = networks.find(network);
  if (index == networks.end()) return nullptr;
  if (const auto exact = index->second.vips.find(ip); exact != index->second.vips.end()) {
    if (const ServiceEntry* best = bestFor(exact->second, client_ns)) return best;
  }
  // Among ranges the client's own namespace beats a longer prefix, as ztunnel has it.
  const ServiceEntry* best = nullptr;
  std::pair<bool, uint8_t> best_rank{};
  for (const auto& [kind, range] : index->second.vip_ranges) {
    if (kind.first != ip.v4) continue;
    const auto found = range.find(masked(ip, kind.second));
    if (found == range.end()) continue;
    const ServiceEntry* candidate = bestFor(found->second, client_ns);
    if (candidate == nullptr) continue;
    const std::pair rank{candidate->value->ns == client_ns, kind.second};
    if (best == nullptr || rank > best_rank) {
      best = candidate;
      best_rank = rank;
    }
  }
  return best;
}

const ServiceEntry* State::Impl::findServiceByHost(std::string_view hostname,
                                                   std::string_view client_ns) const {
  const auto found = services_by_hostname.find(hostname);
  return found == services_by_hostname.end() ? nullptr : bestFor(found->second, client_ns);
}

const ServiceEntry* State::Impl::findService(std::string_view key) const {
  const auto found = services.find(key);
  return found == services.end() || !found->second->value ? nullptr : found->second.get();
}

GatewayTarget State::Impl::findGateway(const GatewayAddress& gateway, std::string_view client_ns) const {
  GatewayTarget target;
  if (const auto* name = std::get_if<GatewayAddress::Hostname>(&gateway.destination)) {
    const std::string key = name->ns + "/" + name->hostname;
    target.service = findService(key);
    if (target.service == nullptr) {
      const auto found = workloads_by_hostname.find(key);
      if (found != workloads_by_hostname.end()) target.workload = found->second.front();
    }
    return target;
  }
  const auto& address = std::get<GatewayAddress::Address>(gateway.destination);
  target.workload = findWorkload(address.network, address.ip);
  if (target.workload == nullptr) target.service = findServiceByVip(address.network, address.ip, client_ns);
  return target;
}

}  // namespace ebbtide
