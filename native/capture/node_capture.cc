// Opening and adopting, trusting proxies, and what pods have in common. Steps of one pod are in
// node_capture_pod.cc.
#include "node_capture.h"

#include <bpf/bpf.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "error.h"
#include "netns.h"
#include "pins.h"
#include "process.h"

namespace ebbtide::capture {

namespace {

constexpr unsigned kFlowBatch = 4096;

Fd openDirectory(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw CaptureError("opening " + path, errno);
  return fd;
}

}  // namespace

bool isValidUid(const std::string& uid) {
  return !uid.empty() && uid.size() < EBB_UID_SIZE &&
         std::all_of(
             uid.begin(), uid.end(), [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_'; });
}

NodeCapture::NodeCapture(std::string cgroup, std::string pin_directory, GuardKind guard_kind,
                         const std::string& host_netns, const std::optional<HoldOptions>& hold)
    : NodeCapture(std::move(cgroup), std::move(pin_directory), guard_kind, host_netns, hold, Opener::kAgent) {
}

void NodeCapture::guardBoot(const std::string& cgroup, const std::string& pin_directory,
                            const std::string& host_netns, const HoldOptions& hold) {
  NodeCapture(cgroup, pin_directory, GuardKind::kAutomatic, host_netns, hold, Opener::kBootGuard);
}

NodeCapture::NodeCapture(std::string cgroup, std::string pin_directory, GuardKind guard_kind,
                         const std::string& host_netns, const std::optional<HoldOptions>& hold, Opener opener)
    : cgroup_(std::move(cgroup)), pin_directory_(std::move(pin_directory)), guard_kind_(guard_kind) {
  root_ = pin_directory_ + "/" EBB_PIN_VERSION;
  map_directory_ = root_ + "/maps";
  cgroup_fd_ = openDirectory(cgroup_);
  host_netns_ = openNetns(host_netns.empty() ? "/proc/thread-self/ns/net" : host_netns);
  on_node_ = netnsInode(host_netns_.get()) == netnsInode(openNetns("/proc/thread-self/ns/net").get());
  makePinDirectory(pin_directory_);
  lock_ = lockPins(pin_directory_);
  refuseOtherVersions();
  std::string mark = root_ + "/" + kBootGuardMark;
  if (exists(root_)) origin_ = exists(mark) ? Origin::kBootGuard : Origin::kAgent;
  if (opener == Opener::kBootGuard) {
    if (origin_ == Origin::kAgent)
      throw AgentPinned("guarding the boot", EALREADY, "an agent's programs are pinned at " + root_);
    makeDirectory(root_);
    makeDirectory(mark);  // first, so that what is half made is known as the guard's
  }
  for (const char* name : {"", "/maps", "/links", "/pods"}) makeDirectory(root_ + name);
  for (const std::string& directory : other_guards_) shareListening(directory, root_);
  CapturePrograms loaded = loadCapture(map_directory_);
  maps_ = std::move(loaded.maps);
  uint64_t all_pods = EBB_ALL_PODS;
  ebb_stats none{};
  if (bpf_map_update_elem(maps_.stats.get(), &all_pods, &none, BPF_NOEXIST) && errno != EEXIST)
    throw CaptureError("making the counters of all pods", errno);
  hold_ = std::make_unique<Hold>(std::move(loaded.hold_maps), root_, cgroup_fd_.get());
  forgetDeadProcesses();
  hold_options_ = hold;
  adopt();
  attachAll(hold, loaded);
  replaceOtherGuards();
  if (opener == Opener::kAgent && rmdir(mark.c_str()) && errno != ENOENT)
    throw CaptureError("taking over from the boot guard", errno);
  for (const char* name : {"/maps", "/links"}) keep(root_ + name);
  for (const auto& [uid, pod] : pods_) keep(podDirectory(uid));
}

void NodeCapture::attachAll(const std::optional<HoldOptions>& hold, CapturePrograms& loaded) {
  attachCgroupPrograms(loaded.programs);
  if (hold) {
    HoldPrograms programs = loadHold(map_directory_);
    hold_->begin(*hold, netnsCookie(host_netns_.get()), programs.tracepoints);
    attachCgroupPrograms(programs.cgroup);
  } else {
    hold_->end();
  }
}

// Programs of two versions would both rewrite. Those that are there go on working until they are told to go.
// A boot guard that no agent took over from only refuses, so it can stand beside ours until that holds.
void NodeCapture::refuseOtherVersions() {
  for (const std::string& name : listDirectory(pin_directory_)) {
    if (name == EBB_PIN_VERSION) continue;
    std::string directory = pin_directory_ + "/" + name;
    if (!exists(directory + "/" + kBootGuardMark))
      throw OtherVersionPinned(
          "using pin directory " + pin_directory_, EEXIST,
          "it holds pins of another version (" + name + "): run ebbtide uninstall first");
    other_guards_.push_back(directory);
  }
}

// The boot guard that is on the node may be older or newer than the agent that comes.
void NodeCapture::replaceOtherGuards() {
  for (const std::string& directory : other_guards_) {
    for (const Newcomer& each : newcomersOf(directory)) hold_->add(each);
    removePins(directory);
  }
  other_guards_.clear();
}

void NodeCapture::attachCgroupPrograms(const std::vector<CgroupProgram>& programs) {
  struct stat info;
  if (fstat(cgroup_fd_.get(), &info)) throw CaptureError("fstat of " + cgroup_, errno);
  for (const CgroupProgram& each : programs) {
    std::string path = root_ + "/links/" + each.name;
    Fd link = openPin(path);
    if (link && linkTarget(link.get()) == info.st_ino) {
      updateLink(link.get(), each.program.get(), path);
      continue;
    }
    if (link) removeLink(path);
    Fd fresh(bpf_link_create(each.program.get(), cgroup_fd_.get(),
                             static_cast<bpf_attach_type>(each.attach_type), nullptr));
    if (!fresh)
      throw CaptureError("attaching " + each.name + " to " + cgroup_, errno,
                         "it must be a directory of cgroup2");
    pin(fresh.get(), path);
  }
}

void NodeCapture::trustProxy(pid_t pid) {
  ProcessIdentity identity = identifyProcess(pid, cgroup_);
  uint32_t key = static_cast<uint32_t>(pid);
  ebb_proxy value{identity.cgroup, identity.start_ticks};
  if (bpf_map_update_elem(maps_.proxies.get(), &key, &value, BPF_ANY))
    throw CaptureError("trusting process " + std::to_string(pid), errno);
}

void NodeCapture::distrustProxy(pid_t pid) {
  uint32_t key = static_cast<uint32_t>(pid);
  if (bpf_map_delete_elem(maps_.proxies.get(), &key) && errno != ENOENT)
    throw CaptureError("distrusting process " + std::to_string(pid), errno);
}

void NodeCapture::trustProber(pid_t pid) {
  ProcessIdentity identity = identifyProcess(pid, cgroup_);
  uint32_t key = static_cast<uint32_t>(pid);
  Fd netns = openNetns("/proc/" + std::to_string(pid) + "/ns/net");
  ebb_prober value{identity.cgroup, identity.start_ticks, netnsCookie(netns.get())};
  if (processStart(pid) != identity.start_ticks)
    throw CaptureError("trusting process " + std::to_string(pid), ESRCH, "it ended meanwhile");
  for (const auto& [uid, pod] : pods_)
    if (pod.cookie == value.cookie)
      throw CaptureError("trusting process " + std::to_string(pid) + " as kubelet", EINVAL,
                         "it is in the network namespace of pod " + uid);
  if (bpf_map_update_elem(maps_.probers.get(), &key, &value, BPF_ANY))
    throw CaptureError("trusting process " + std::to_string(pid) + " as kubelet", errno);
}

void NodeCapture::distrustProber(pid_t pid) {
  uint32_t key = static_cast<uint32_t>(pid);
  if (bpf_map_delete_elem(maps_.probers.get(), &key) && errno != ENOENT)
    throw CaptureError("distrusting process " + std::to_string(pid), errno);
}

void NodeCapture::forgetDeadProcesses() {
  for (int map : {maps_.proxies.get(), maps_.probers.get()}) {
    uint32_t key, next;
    std::vector<uint32_t> dead;
    for (int error = bpf_map_get_next_key(map, nullptr, &next); !error;
         error = bpf_map_get_next_key(map, &key, &next)) {
      key = next;
      ebb_prober value;  // begins as ebb_proxy does
      if (!bpf_map_lookup_elem(map, &key, &value) &&
          processStart(static_cast<pid_t>(key)) != value.start_ticks)
        dead.push_back(key);
    }
    for (uint32_t pid : dead) bpf_map_delete_elem(map, &pid);
  }
}

void NodeCapture::adopt() {
  uint64_t cookie, next;
  for (int error = bpf_map_get_next_key(maps_.pods.get(), nullptr, &next); !error;
       error = bpf_map_get_next_key(maps_.pods.get(), &cookie, &next)) {
    cookie = next;
    ebb_pod value;
    if (bpf_map_lookup_elem(maps_.pods.get(), &cookie, &value)) continue;
    value.uid[EBB_UID_SIZE - 1] = 0;
    if (isValidUid(value.uid)) pods_[value.uid].cookie = cookie;
  }
  ebb_address_key address, next_address;
  for (int error = bpf_map_get_next_key(maps_.addresses.get(), nullptr, &next_address); !error;
       error = bpf_map_get_next_key(maps_.addresses.get(), &address, &next_address)) {
    address = next_address;
    for (auto& [uid, pod] : pods_)
      if (pod.cookie == address.cookie)
        pod.addresses.push_back(
            {address.address[0], address.address[1], address.address[2], address.address[3]});
  }
  forgetUnknown();
  std::map<uint64_t, std::vector<ebb_tuple>> inherited;
  if (!pods_.empty()) collectInherited(inherited);
  std::vector<std::string> gone;
  for (auto& [uid, pod] : pods_) {
    pod.inherited = std::move(inherited[pod.cookie]);
    ebb_pod value;
    bool captured =
        !bpf_map_lookup_elem(maps_.pods.get(), &pod.cookie, &value) && value.flags & EBB_POD_CAPTURED;
    Fd steer = openPin(podDirectory(uid) + "/steer");
    // A captured pod whose namespace is gone will not be asked for again.
    if (captured && (!steer || !linkTarget(steer.get()))) {
      gone.push_back(uid);
      continue;
    }
    adoptPod(uid, pod);
    adopted_.push_back({uid, pod.cookie, captured, pod.addresses});
  }
  for (const std::string& uid : gone) releasePod(uid);
  // Pins without a map entry are what a process left that ended between two steps.
  for (const std::string& uid : listDirectory(root_ + "/pods"))
    if (!pods_.contains(uid)) removePins(podDirectory(uid));
}

// Addresses and counters that a process left which ended in the middle of prepare or release.
void NodeCapture::forgetUnknown() {
  auto known = [&](uint64_t cookie) {
    return std::any_of(pods_.begin(), pods_.end(), [&](auto& each) { return each.second.cookie == cookie; });
  };
  std::vector<ebb_address_key> addresses;
  ebb_address_key address, next_address;
  for (int error = bpf_map_get_next_key(maps_.addresses.get(), nullptr, &next_address); !error;
       error = bpf_map_get_next_key(maps_.addresses.get(), &address, &next_address)) {
    address = next_address;
    if (!known(address.cookie)) addresses.push_back(address);
  }
  for (const ebb_address_key& each : addresses) bpf_map_delete_elem(maps_.addresses.get(), &each);
  std::vector<ebb_owner_key> owners;
  ebb_owner_key owner, next_owner;
  for (int error = bpf_map_get_next_key(maps_.owners.get(), nullptr, &next_owner); !error;
       error = bpf_map_get_next_key(maps_.owners.get(), &owner, &next_owner)) {
    owner = next_owner;
    uint64_t of;
    if (!bpf_map_lookup_elem(maps_.owners.get(), &owner, &of) && !known(of)) owners.push_back(owner);
  }
  for (const ebb_owner_key& each : owners) bpf_map_delete_elem(maps_.owners.get(), &each);
  std::vector<uint64_t> counters;
  uint64_t cookie, next;
  for (int error = bpf_map_get_next_key(maps_.stats.get(), nullptr, &next); !error;
       error = bpf_map_get_next_key(maps_.stats.get(), &cookie, &next)) {
    cookie = next;
    if (cookie != EBB_ALL_PODS && !known(cookie)) counters.push_back(cookie);
  }
  for (uint64_t each : counters) bpf_map_delete_elem(maps_.stats.get(), &each);
}

void NodeCapture::adoptPod(const std::string& uid, Pod& pod) {
  std::string directory = podDirectory(uid);
  Fd steer = openPin(directory + "/steer");
  if (steer && linkTarget(steer.get()))
    updateLink(steer.get(), loadSteer(map_directory_, pod.cookie).get(), directory + "/steer");
  if (guardsOf(uid)) {
    Fd program = loadGuard(map_directory_, pod.cookie);
    onNode([&] { updateGuards(directory, program.get()); });
    pod.guard = "attached";
  }
}

void NodeCapture::collectInherited(std::map<uint64_t, std::vector<ebb_tuple>>& by_cookie) {
  std::vector<ebb_tuple> keys(kFlowBatch);
  std::vector<ebb_flow> values(kFlowBatch);
  uint32_t position = 0;
  bool first = true, more = true;
  while (more) {
    uint32_t count = kFlowBatch;
    int error = bpf_map_lookup_batch(maps_.flows.get(), first ? nullptr : &position, &position, keys.data(),
                                     values.data(), &count, nullptr);
    if (error && errno != ENOENT) throw CaptureError("reading the flows map", errno);
    more = !error;
    first = false;
    for (uint32_t i = 0; i < count; i++)
      if (values[i].kind == EBB_KIND_INHERITED) by_cookie[keys[i].cookie].push_back(keys[i]);
  }
}

unsigned NodeCapture::countListeners(uint64_t cookie, uint32_t role) const {
  unsigned count = 0;
  for (uint32_t slot = 0; slot < EBB_MAX_SLOTS; slot++) {
    ebb_listener_key key{cookie, role, slot};
    uint64_t socket_cookie;
    if (!bpf_map_lookup_elem(maps_.listeners.get(), &key, &socket_cookie)) count++;
  }
  return count;
}

std::vector<PodStatus> NodeCapture::status() {
  std::vector<PodStatus> result;
  std::string links = root_ + "/links/";
  bool attached = std::none_of(kept_.begin(), kept_.end(), [&](const auto& kept) {
    return kept.first.starts_with(links) && isDetached(kept.first, kept.second.get());
  });
  for (auto& [uid, pod] : pods_) {
    PodStatus each;
    each.uid = uid;
    each.cookie = pod.cookie;
    ebb_pod entry{};
    if (!bpf_map_lookup_elem(maps_.pods.get(), &pod.cookie, &entry))
      each.outbound = attached && entry.flags & EBB_POD_CAPTURED;
    Fd steer = openPin(podDirectory(uid) + "/steer");
    each.inbound = steer && linkTarget(steer.get());
    each.guard = pod.guard;
    if (pod.guard == "attached" && !guardsOf(uid)) each.guard = "gone: the host side of the veth was removed";
    each.outbound_listeners = countListeners(pod.cookie, EBB_ROLE_OUTBOUND);
    each.hbone_listeners = countListeners(pod.cookie, EBB_ROLE_HBONE);
    each.plaintext_listeners = countListeners(pod.cookie, EBB_ROLE_PLAINTEXT);
    ebb_stats stats{};
    if (!bpf_map_lookup_elem(maps_.stats.get(), &pod.cookie, &stats)) {
      each.captured_connections = stats.captured;
      each.steered_connections = stats.steered;
      each.refused_connections = stats.refused;
      each.flows = stats.flows;
      each.guard_drops = stats.guard_drops;
      each.probe_connections = stats.probes;
      each.last_capture_ns = stats.last_ns;
    }
    pruneInherited(pod);
    each.inherited_connections = static_cast<unsigned>(pod.inherited.size());
    result.push_back(std::move(each));
  }
  return result;
}

void NodeCapture::removeAll() {
  hold_->end();
  while (!pods_.empty()) releasePod(pods_.begin()->first);
  removePins(root_);
  if (rmdir(pin_directory_.c_str()) && errno != ENOTEMPTY && errno != ENOENT && errno != EBUSY)
    throw CaptureError("removing directory " + pin_directory_, errno);
}

}  // namespace ebbtide::capture
