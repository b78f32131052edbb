// Steps of one pod: prepare, activate, release. Each is idempotent, because the process may end between any
// two lines.
#include <bpf/bpf.h>
#include <fcntl.h>

#include <algorithm>
#include <cstring>

#include "boot_time.h"
#include "error.h"
#include "netlink.h"
#include "netns.h"
#include "node_capture.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

ebb_address_key addressKey(uint64_t cookie, const Address& address) {
  ebb_address_key key{};
  key.cookie = cookie;
  std::memcpy(key.address, address.data(), sizeof(key.address));
  return key;
}

ebb_owner_key ownerKey(const Address& address) {
  ebb_owner_key key{};
  std::memcpy(key.address, address.data(), sizeof(key.address));
  return key;
}

ebb_pod describe(const PodSpec& spec) {
  ebb_pod value{};
  if (spec.bypass_inbound) value.flags |= EBB_POD_BYPASS_INBOUND;
  for (const Address& address : spec.addresses) {
    uint32_t flag = isMapped(address) ? EBB_POD_HAS_IP4 : EBB_POD_HAS_IP6;
    if (value.flags & flag) continue;
    value.flags |= flag;
    std::memcpy(isMapped(address) ? value.ip4 : value.ip6, address.data(), sizeof(value.ip4));
  }
  std::memcpy(value.uid, spec.uid.c_str(), spec.uid.size());
  return value;
}

// Differs from that of an earlier release of the same pod, whose flows may live on and count for nothing.
uint32_t newGeneration() {
  return static_cast<uint32_t>(bootTime() / 1000000);
}

bool tupleOrder(const ebb_tuple& a, const ebb_tuple& b) {
  return std::memcmp(&a, &b, sizeof(a)) < 0;
}

}  // namespace

void NodeCapture::writeAddresses(Pod& pod, const std::vector<Address>& addresses) {
  uint32_t one = 1;
  for (const Address& address : addresses) {
    ebb_address_key key = addressKey(pod.cookie, address);
    if (bpf_map_update_elem(maps_.addresses.get(), &key, &one, BPF_ANY))
      throw CaptureError("storing a pod's address", errno);
    ebb_owner_key owner = ownerKey(address);
    if (bpf_map_update_elem(maps_.owners.get(), &owner, &pod.cookie, BPF_ANY))
      throw CaptureError("storing a pod's address", errno);
  }
  for (const Address& old : pod.addresses) {
    if (std::find(addresses.begin(), addresses.end(), old) != addresses.end()) continue;
    ebb_address_key key = addressKey(pod.cookie, old);
    bpf_map_delete_elem(maps_.addresses.get(), &key);
    // A pod that came later may have been given the same address.
    ebb_owner_key owner = ownerKey(old);
    uint64_t cookie;
    if (!bpf_map_lookup_elem(maps_.owners.get(), &owner, &cookie) && cookie == pod.cookie)
      bpf_map_delete_elem(maps_.owners.get(), &owner);
  }
  pod.addresses = addresses;
}

void NodeCapture::prepare(const PodSpec& spec) {
  if (!isValidUid(spec.uid)) throw CaptureError("pod uid '" + spec.uid + "' cannot name pins", EINVAL);
  if (spec.addresses.empty()) throw CaptureError("preparing pod " + spec.uid, EINVAL, "it has no address");
  verifyNetns(spec.netns_fd, "the descriptor of pod " + spec.uid);
  uint64_t cookie = netnsCookie(spec.netns_fd);
  for (auto& [uid, pod] : pods_)
    if (pod.cookie == cookie && uid != spec.uid)
      throw CaptureError("preparing pod " + spec.uid, EEXIST, "its network namespace belongs to pod " + uid);
  if (netnsInode(spec.netns_fd) == netnsInode(host_netns_.get()))
    throw CaptureError("preparing pod " + spec.uid, EINVAL, "its network namespace is the agent's own");

  auto known = pods_.find(spec.uid);
  if (known != pods_.end() && known->second.cookie != cookie) releasePod(spec.uid);  // a new sandbox
  Pod& pod = pods_[spec.uid];
  pod.cookie = cookie;

  ebb_stats stats{};
  stats.generation = newGeneration();
  if (bpf_map_update_elem(maps_.stats.get(), &cookie, &stats, BPF_NOEXIST) && errno != EEXIST)
    throw CaptureError("making counters for pod " + spec.uid, errno);
  writeAddresses(pod, spec.addresses);
  ebb_pod value = describe(spec), old;
  if (!bpf_map_lookup_elem(maps_.pods.get(), &cookie, &old)) value.flags |= old.flags & EBB_POD_CAPTURED;
  if (bpf_map_update_elem(maps_.pods.get(), &cookie, &value, BPF_ANY))
    throw CaptureError("storing pod " + spec.uid, errno);
}

void NodeCapture::attachSteer(const PodSpec& spec, const Pod& pod) {
  std::string directory = podDirectory(spec.uid), path = directory + "/steer";
  makeDirectory(directory);
  Fd program = loadSteer(map_directory_, pod.cookie);
  Fd link = openPin(path);
  if (link && linkTarget(link.get())) return updateLink(link.get(), program.get(), path);
  if (link) removeLink(path);
  Fd fresh(bpf_link_create(program.get(), spec.netns_fd, BPF_SK_LOOKUP, nullptr));
  if (!fresh) throw CaptureError("attaching sk_lookup to the network namespace of pod " + spec.uid, errno);
  pin(fresh.get(), path);
}

void NodeCapture::publishInherited(const PodSpec& spec, Pod& pod) {
  ebb_flow flow{};
  flow.kind = EBB_KIND_INHERITED;
  size_t inherited = 0;
  for (auto& [uid, each] : pods_) inherited += each.inherited.size();
  for (const auto& [tuple, answered] : openConnections(spec.netns_fd, pod.cookie)) {
    flow.accepted = answered;
    Address local{tuple.local[0], tuple.local[1], tuple.local[2], tuple.local[3]};
    Address remote{tuple.remote[0], tuple.remote[1], tuple.remote[2], tuple.remote[3]};
    if (isLoopback(local) || isLoopback(remote)) continue;
    if (std::find(pod.addresses.begin(), pod.addresses.end(), remote) != pod.addresses.end()) continue;
    // A pod may have opened any number before it was enrolled. What finds no room is cut by the guard.
    if (pod.inherited.size() + inherited >= EBB_MAX_INHERITED) return;
    // What a program published already is no inherited connection.
    if (bpf_map_update_elem(maps_.flows.get(), &tuple, &flow, BPF_NOEXIST)) {
      if (errno == EEXIST) continue;
      if (errno == E2BIG) return;
      throw CaptureError("listing the open connections of pod " + spec.uid, errno);
    }
    pod.inherited.push_back(tuple);
    inherited++;
  }
  if (!pod.inherited.empty() && !pod.netns) pod.netns = Fd(fcntl(spec.netns_fd, F_DUPFD_CLOEXEC, 3));
}

// A later connection of the same tuple belongs to the programs, which count it.
void NodeCapture::forgetInherited(const ebb_tuple& tuple) {
  ebb_flow flow;
  if (!bpf_map_lookup_elem(maps_.flows.get(), &tuple, &flow) && flow.kind == EBB_KIND_INHERITED)
    bpf_map_delete_elem(maps_.flows.get(), &tuple);
}

void NodeCapture::pruneInherited(Pod& pod) {
  if (pod.inherited.empty()) {
    pod.netns.reset();
    return;
  }
  if (!pod.netns) return;  // adopted, and the agent has not shown the namespace yet
  std::vector<ebb_tuple> open;
  for (const Connection& each : openConnections(pod.netns.get(), pod.cookie)) open.push_back(each.tuple);
  std::sort(open.begin(), open.end(), tupleOrder);
  std::erase_if(pod.inherited, [&](const ebb_tuple& tuple) {
    if (std::binary_search(open.begin(), open.end(), tuple, tupleOrder)) return false;
    forgetInherited(tuple);
    return true;
  });
  if (pod.inherited.empty()) pod.netns.reset();
}

void NodeCapture::onNode(const std::function<void()>& work) const {
  if (on_node_) {
    work();
  } else {
    inNetns(host_netns_.get(), work);
  }
}

unsigned NodeCapture::guardsOf(const std::string& uid) const {
  unsigned count = 0;
  onNode([&] { count = countGuards(podDirectory(uid)); });
  return count;
}

void NodeCapture::guardPod(const PodSpec& spec, Pod& pod, BeforeCapture& before) {
  std::string why;
  unsigned attached = 0;
  Fd program;
  for (const PodInterface& each : podInterfaces(spec.netns_fd, host_netns_.get())) {
    before.sent_bytes += each.sent_bytes;
    before.received_bytes += each.received_bytes;
    bool pair = each.kind == "veth" || each.kind == "netkit";
    if (!pair && !each.up) continue;  // tunl0, sit0 and the like, which modules make everywhere
    if (!pair) {
      why = each.name + " is no veth but '" + each.kind + "'";
    } else if (!each.peer_index || !each.peer_is_here) {
      why = "the other end of " + each.name + " is not in the node's network namespace";
    } else {
      if (!program) program = loadGuard(map_directory_, pod.cookie);
      onNode([&] { attachGuard(podDirectory(spec.uid), each.peer_index, program.get(), guard_kind_); });
      attached++;
    }
  }
  if (!why.empty())
    pod.guard = "not attached: " + why;
  else
    pod.guard = attached ? "attached" : "not attached: the pod has no interface";
}

std::optional<BeforeCapture> NodeCapture::activate(const PodSpec& spec) {
  prepare(spec);
  Pod& pod = pods_.at(spec.uid);
  ebb_pod old{};
  bool first = bpf_map_lookup_elem(maps_.pods.get(), &pod.cookie, &old) || !(old.flags & EBB_POD_CAPTURED);
  BeforeCapture before;
  attachSteer(spec, pod);
  ebb_pod value = describe(spec);
  value.flags |= EBB_POD_CAPTURED;
  if (bpf_map_update_elem(maps_.pods.get(), &pod.cookie, &value, BPF_ANY))
    throw CaptureError("capturing pod " + spec.uid, errno);
  if (!pod.inherited.empty() && !pod.netns) pod.netns = Fd(fcntl(spec.netns_fd, F_DUPFD_CLOEXEC, 3));
  // From here no socket of the pod can connect outside unpublished, so what is open and not published is
  // older. Listed again once the guard is on: a connect that was decided before, but whose socket appeared
  // only after the first list, must live too.
  bool guarded = guardsOf(spec.uid) > 0;
  if (!guarded) publishInherited(spec, pod);
  guardPod(spec, pod, before);
  if (!guarded) publishInherited(spec, pod);
  keep(podDirectory(spec.uid));
  hold_->captured(spec.uid);
  before.inherited_connections = pod.inherited.size();
  return first ? std::optional(before) : std::nullopt;
}

void NodeCapture::release(const std::string& uid) {
  // What is let go is plain, or a pod that was seen to appear would be held again.
  hold_->released(uid);
  releasePod(uid);
}

// The guard goes first: it would drop what is not captured any more.
void NodeCapture::drain(const std::string& uid) {
  hold_->released(uid);
  auto found = pods_.find(uid);
  if (found == pods_.end()) return;
  Pod& pod = found->second;
  unguard(uid, pod);
  keep(podDirectory(uid));
  ebb_pod value;
  if (bpf_map_lookup_elem(maps_.pods.get(), &pod.cookie, &value)) return;
  value.flags = (value.flags & ~EBB_POD_CAPTURED) | EBB_POD_DRAINING;
  if (bpf_map_update_elem(maps_.pods.get(), &pod.cookie, &value, BPF_EXIST))
    throw CaptureError("draining pod " + uid, errno);
}

void NodeCapture::unguard(const std::string& uid, Pod& pod) {
  std::string directory = podDirectory(uid);
  letGo(directory);
  onNode([&] { removeGuards(directory); });
  pod.guard = kNoGuard;
  for (const ebb_tuple& tuple : pod.inherited) forgetInherited(tuple);
  pod.inherited.clear();
}

void NodeCapture::releasePod(const std::string& uid) {
  auto found = pods_.find(uid);
  if (found == pods_.end()) return;
  Pod& pod = found->second;
  unguard(uid, pod);
  if (bpf_map_delete_elem(maps_.pods.get(), &pod.cookie) && errno != ENOENT)
    throw CaptureError("releasing pod " + uid, errno);
  removePins(podDirectory(uid));
  writeAddresses(pod, {});
  bpf_map_delete_elem(maps_.stats.get(), &pod.cookie);
  pods_.erase(found);
}

}  // namespace ebbtide::capture
