// tcx by LINK_CREATE, which libbpf 1.1 does not know by name; clsact by libbpf's tc calls.
#include "guard.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <net/if.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "error.h"
#include "fd.h"
#include "netlink.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

constexpr auto kTcxIngress = static_cast<bpf_attach_type>(46);  // BPF_TCX_INGRESS, Linux 6.6
constexpr uint32_t kBefore = 1 << 3;                            // BPF_F_BEFORE: of nothing means of all
constexpr const char* kLinkPrefix = "guard-";
constexpr const char* kClassicPrefix = "guardtc-";
// Filter of ours on a clsact qdisc that others use as well.
constexpr uint32_t kHandle = 1;
constexpr uint32_t kPriority = 0xebb;
constexpr uint32_t kMaxMaps = 64;
constexpr const char* kProgram = "ebb_guard";

int indexOf(const std::string& name) {
  return std::stoi(name.substr(name.find('-') + 1));
}

// Of a program or a map, by what the kernel tells of it (bpf_prog_info, bpf_map_info).
template <typename Info>
uint32_t idOf(int fd) {
  Info info{};
  unsigned size = sizeof(info);
  if (bpf_obj_get_info_by_fd(fd, &info, &size)) throw CaptureError("asking the id of a BPF object", errno);
  return info.id;
}

bpf_tc_hook ingressOf(int interface_index) {
  bpf_tc_hook hook{};
  hook.sz = sizeof(hook);
  hook.ifindex = interface_index;
  hook.attach_point = BPF_TC_INGRESS;
  return hook;
}

bpf_tc_opts filter() {
  bpf_tc_opts options{};
  options.sz = sizeof(options);
  options.handle = kHandle;
  options.priority = kPriority;
  return options;
}

// First, because a network plugin's program that is already there accepts packets, and the rest is not run.
Fd linkTcx(int program_fd, int interface_index) {
  bpf_link_create_opts options{};
  options.sz = sizeof(options);
  options.flags = kBefore;
  return Fd(bpf_link_create(program_fd, interface_index, kTcxIngress, &options));
}

// Id of the program that the filter with our handle runs; 0 where there is none.
uint32_t classicProgram(int interface_index) {
  bpf_tc_hook hook = ingressOf(interface_index);
  bpf_tc_opts options = filter();
  return bpf_tc_query(&hook, &options) ? 0 : options.prog_id;
}

// Ids of the program's maps; none where it has another name or is gone.
std::vector<uint32_t> mapsOf(uint32_t program_id, const char* name) {
  Fd program(bpf_prog_get_fd_by_id(program_id));
  std::vector<uint32_t> maps(kMaxMaps);
  bpf_prog_info info{};
  info.map_ids = reinterpret_cast<uintptr_t>(maps.data());
  info.nr_map_ids = kMaxMaps;
  unsigned size = sizeof(info);
  if (!program || bpf_obj_get_info_by_fd(program.get(), &info, &size) || std::strcmp(info.name, name))
    return {};
  maps.resize(std::min(info.nr_map_ids, kMaxMaps));
  return maps;
}

// Whether programs of these maps are of one capture.
bool share(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
}

// Maps of every capture on this kernel.
std::vector<uint32_t> mapsInUse() {
  std::vector<uint32_t> maps;
  for (uint32_t id = 0; !bpf_prog_get_next_id(id, &id);)
    for (uint32_t map : mapsOf(id, "ebb_connect4")) maps.push_back(map);
  return maps;
}

void addFilter(int interface_index, int program_fd) {
  bpf_tc_hook hook = ingressOf(interface_index);
  int error = bpf_tc_hook_create(&hook);
  if (error && error != -EEXIST) throw CaptureError("making a clsact qdisc for the guard", -error);
  bpf_tc_opts options = filter();
  options.prog_fd = program_fd;
  options.flags = BPF_TC_F_REPLACE;
  if ((error = bpf_tc_attach(&hook, &options))) throw CaptureError("attaching the guard by clsact", -error);
}

// Returns 0, or -errno.
int detachFilter(int interface_index) {
  bpf_tc_hook hook = ingressOf(interface_index);
  bpf_tc_opts options = filter();
  return bpf_tc_detach(&hook, &options);
}

void removeFilter(int interface_index, const std::string& what) {
  if (int error = detachFilter(interface_index)) throw CaptureError("detaching " + what, -error);
}

// Pinned first: an agent that is killed in between leaves a pin without a filter, which nobody minds, and not
// a filter that nobody knows of.
void attachClassic(const std::string& path, int interface_index, int program_fd) {
  unpin(path);
  pin(program_fd, path);
  addFilter(interface_index, program_fd);
}

}  // namespace

bool isGuardPin(const std::string& name) {
  return name.starts_with(kLinkPrefix) || isClassicGuardPin(name);
}

bool isClassicGuardPin(const std::string& name) {
  return name.starts_with(kClassicPrefix);
}

bool isClassicGuardAttached(const std::string& name, int program_fd) {
  uint32_t attached = classicProgram(indexOf(name)), pinned = idOf<bpf_prog_info>(program_fd);
  if (!attached || attached == pinned) return attached;
  // Of the same capture, whose agent was killed when it had put another program into one of the two.
  return share(mapsOf(attached, kProgram), mapsOf(pinned, kProgram));
}

void attachGuard(const std::string& directory, int interface_index, int program_fd, GuardKind kind) {
  std::string suffix = std::to_string(interface_index);
  std::string path = directory + "/" + kLinkPrefix + suffix;
  std::string classic_path = directory + "/" + kClassicPrefix + suffix;
  if (exists(classic_path)) return attachClassic(classic_path, interface_index, program_fd);
  Fd link = openPin(path);
  if (link && linkTarget(link.get()) == static_cast<uint64_t>(interface_index))
    return updateLink(link.get(), program_fd, path);
  if (link) removeLink(path);
  if (kind == GuardKind::kAutomatic) {
    Fd fresh = linkTcx(program_fd, interface_index);
    if (fresh) return pin(fresh.get(), path);
    if (errno != EINVAL && errno != EOPNOTSUPP) throw CaptureError("attaching the guard by tcx", errno);
  }
  attachClassic(classic_path, interface_index, program_fd);
}

void removeClassicGuard(const std::string& path, const std::string& name) {
  Fd program = openPin(path);
  if (!program || !isClassicGuardAttached(name, program.get())) return;
  removeFilter(indexOf(name), "the guard " + path);
  // The qdisc stays: others may use it, it does nothing by itself, and it goes with the interface.
}

void removeGuards(const std::string& directory) {
  for (const std::string& name : listDirectory(directory)) {
    if (!isGuardPin(name)) continue;
    std::string path = directory + "/" + name;
    if (isClassicGuardPin(name)) {
      removeClassicGuard(path, name);
      unpin(path);
    } else {
      removeLink(path);
    }
  }
}

unsigned countGuards(const std::string& directory) {
  unsigned count = 0;
  for (const std::string& name : listDirectory(directory)) {
    if (!isGuardPin(name)) continue;
    Fd object = openPin(directory + "/" + name);
    if (!object) continue;
    if (isClassicGuardPin(name) ? isClassicGuardAttached(name, object.get()) : linkTarget(object.get()) != 0)
      count++;
  }
  return count;
}

void updateGuards(const std::string& directory, int program_fd) {
  for (const std::string& name : listDirectory(directory)) {
    if (!isGuardPin(name)) continue;
    std::string path = directory + "/" + name;
    Fd object = openPin(path);
    if (!object) continue;
    if (isClassicGuardPin(name)) {
      if (isClassicGuardAttached(name, object.get())) attachClassic(path, indexOf(name), program_fd);
    } else if (linkTarget(object.get())) {
      updateLink(object.get(), program_fd, path);
    }
  }
}

void addPinnedGuards(const std::string& directory, PinnedGuards& pinned) {
  for (const std::string& name : listDirectory(directory))
    if (isClassicGuardPin(name)) pinned.interfaces.insert(indexOf(name));
}

unsigned removeStrayGuards(const PinnedGuards* own) {
  std::vector<uint32_t> in_use = mapsInUse(), own_maps;
  if (own) own_maps.push_back(idOf<bpf_map_info>(own->map_fd));
  unsigned removed = 0;
  for (const TcFilter& each : ingressFilters()) {
    if (each.priority != kPriority) continue;
    std::vector<uint32_t> maps = mapsOf(each.program, kProgram);
    if (maps.empty()) continue;
    bool wanted =
        share(maps, own_maps) ? own->interfaces.contains(each.interface_index) : share(maps, in_use);
    if (!wanted && !detachFilter(each.interface_index)) removed++;
  }
  return removed;
}

void tryTcx(int program_fd, int interface_index) {
  if (!linkTcx(program_fd, interface_index)) throw CaptureError("attaching a program by tcx", errno);
}

void tryClassic(int program_fd, int interface_index) {
  addFilter(interface_index, program_fd);
  removeFilter(interface_index, "a program by clsact");
}

}  // namespace ebbtide::capture
