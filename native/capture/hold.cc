// The maps of hold.bpf.h from user space, and raw tracepoint links, whose program cannot be replaced.
#include "hold.h"

#include <bpf/bpf.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "boot_time.h"
#include "error.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

constexpr int kKernfsHandle = 0xfe;  // FILEID_KERNFS of the kernel's include/linux/exportfs.h
constexpr uint64_t kOldNs = 3600ULL * 1000000000;
constexpr const char* kNextSuffix = "_next";
constexpr const char* kLinkNames[] = {"ebb_mkdir", "ebb_rmdir", "ebb_hold_in", "ebb_hold_out"};

ebb_uid uidKey(const std::string& uid) {
  if (uid.empty() || uid.size() >= EBB_POD_UID_SIZE)
    throw CaptureError("deciding about pod '" + uid + "'", EINVAL,
                       "a UID has 1 to " + std::to_string(EBB_POD_UID_SIZE - 1) + " characters");
  ebb_uid key{};
  std::memcpy(key.text, uid.data(), uid.size());
  return key;
}

std::string uidText(const ebb_uid& uid) {
  return {uid.text, strnlen(uid.text, sizeof(uid.text))};
}

template <typename Key>
std::vector<Key> keysOf(int map) {
  std::vector<Key> keys;
  Key key, next;
  for (int error = bpf_map_get_next_key(map, nullptr, &next); !error;
       error = bpf_map_get_next_key(map, &key, &next)) {
    key = next;
    keys.push_back(key);
  }
  return keys;
}

uint64_t cgroupId(const std::string& directory) {
  struct stat info;
  struct statfs system;
  if (stat(directory.c_str(), &info) || statfs(directory.c_str(), &system))
    throw CaptureError("finding the pods' cgroup " + directory, errno);
  if (system.f_type != CGROUP2_SUPER_MAGIC)
    throw CaptureError("the pods' cgroup " + directory + " is not on a cgroup2 mount", EINVAL);
  return info.st_ino;
}

// A new link beside the old one, which then takes its place: at no moment is none there, and what both see is
// counted once.
void attachTracepoint(const TracepointProgram& each, const std::string& path) {
  Fd link(bpf_raw_tracepoint_open(each.tracepoint.c_str(), each.program.get()));
  if (!link)
    throw CaptureError("attaching " + each.name + " to tracepoint " + each.tracepoint, errno,
                       "CAP_PERFMON is needed to see new pods");
  std::string next = path + kNextSuffix;
  unpin(next);
  pin(link.get(), next);
  if (std::rename(next.c_str(), path.c_str())) throw CaptureError("replacing pin " + path, errno);
}

}  // namespace

std::vector<Newcomer> newcomersOf(const std::string& version_directory) {
  std::vector<Newcomer> result;
  Fd map = openPin(version_directory + "/maps/ebb_newcomers");
  bpf_map_info info{};
  unsigned size = sizeof(info);
  if (!map || bpf_obj_get_info_by_fd(map.get(), &info, &size) || info.key_size != sizeof(uint64_t) ||
      info.value_size < offsetof(ebb_newcomer, refused_connects))
    return result;
  for (uint64_t id : keysOf<uint64_t>(map.get())) {
    std::vector<char> value(info.value_size);
    if (bpf_map_lookup_elem(map.get(), &id, value.data())) continue;
    ebb_newcomer newcomer{};
    std::memcpy(&newcomer, value.data(), std::min(value.size(), sizeof(newcomer)));
    result.push_back({id, uidText(newcomer.uid), newcomer.since_ns});
  }
  return result;
}

void shareListening(const std::string& other_version, const std::string& own_version) {
  constexpr const char* kPath = "/maps/ebb_listening";
  Fd map = openPin(other_version + kPath);
  bpf_map_info info{};
  unsigned size = sizeof(info);
  if (!map || exists(own_version + kPath) || bpf_obj_get_info_by_fd(map.get(), &info, &size)) return;
  if (info.type == BPF_MAP_TYPE_SK_STORAGE && info.value_size == sizeof(ebb_listening))
    pin(map.get(), own_version + kPath);
}

Hold::Hold(HoldMaps maps, std::string root, int cgroup_fd)
    : maps_(std::move(maps)), root_(std::move(root)), cgroup_fd_(cgroup_fd) {}

void Hold::begin(const HoldOptions& options, uint64_t node_cookie,
                 const std::vector<TracepointProgram>& programs) {
  ebb_hold_settings settings{};
  settings.mode = options.refuse ? EBB_HOLD_REFUSE : EBB_HOLD_ALLOW;
  settings.node = node_cookie;
  if (!options.directory.empty()) settings.scope = cgroupId(options.directory);
  uint32_t only = 0;
  if (bpf_map_update_elem(maps_.settings.get(), &only, &settings, BPF_ANY))
    throw CaptureError("storing how new pods are held", errno);
  mode_ = settings.mode;
  for (const TracepointProgram& each : programs) attachTracepoint(each, root_ + "/links/" + each.name);
}

void Hold::end() {
  ebb_hold_settings settings{};
  uint32_t only = 0;
  if (bpf_map_update_elem(maps_.settings.get(), &only, &settings, BPF_ANY))
    throw CaptureError("storing that new pods are not held", errno);
  mode_ = EBB_HOLD_OFF;
  for (const char* name : kLinkNames) {
    removeLink(root_ + "/links/" + name);
    removeLink(root_ + "/links/" + name + kNextSuffix);
  }
  for (const ebb_uid& uid : keysOf<ebb_uid>(maps_.verdicts.get()))
    bpf_map_delete_elem(maps_.verdicts.get(), &uid);
  for (uint64_t id : keysOf<uint64_t>(maps_.newcomers.get())) bpf_map_delete_elem(maps_.newcomers.get(), &id);
}

void Hold::decide(const std::string& uid, uint32_t verdict, bool free) {
  ebb_uid key = uidKey(uid);
  ebb_decision decision{}, before{};
  if (!bpf_map_lookup_elem(maps_.verdicts.get(), &key, &before)) decision.free_ns = before.free_ns;
  decision.verdict = verdict;
  if (free && !decision.free_ns) decision.free_ns = bootTime();
  if (bpf_map_update_elem(maps_.verdicts.get(), &key, &decision, BPF_ANY))
    throw CaptureError("deciding about pod " + uid, errno,
                       errno == E2BIG ? "too many decisions; forget those of pods that are gone" : "");
}

void Hold::decide(const std::string& uid, uint32_t verdict) {
  if (mode_ == EBB_HOLD_OFF) return;
  ebb_uid key = uidKey(uid);
  ebb_decision before;
  // A plain pod that runs and joins loses nothing meanwhile: it is plain until it is captured.
  if (verdict == EBB_VERDICT_MESH && !bpf_map_lookup_elem(maps_.verdicts.get(), &key, &before) &&
      before.verdict == EBB_VERDICT_PLAIN && exists(key))
    return;
  decide(uid, verdict, verdict == EBB_VERDICT_PLAIN);
}

bool Hold::exists(const ebb_uid& uid) const {
  for (uint64_t id : keysOf<uint64_t>(maps_.newcomers.get())) {
    ebb_newcomer newcomer;
    if (!bpf_map_lookup_elem(maps_.newcomers.get(), &id, &newcomer) &&
        !std::memcmp(&newcomer.uid, &uid, sizeof(uid)))
      return true;
  }
  return false;
}

void Hold::captured(const std::string& uid) {
  // From now on a network namespace of the pod that is not captured is one it got later.
  if (mode_ != EBB_HOLD_OFF && uid.size() < EBB_POD_UID_SIZE) decide(uid, EBB_VERDICT_MESH, true);
}

void Hold::released(const std::string& uid) {
  if (mode_ == EBB_HOLD_OFF || uid.empty() || uid.size() >= EBB_POD_UID_SIZE) return;
  ebb_uid key = uidKey(uid);
  ebb_decision decision;
  if (!bpf_map_lookup_elem(maps_.verdicts.get(), &key, &decision)) decide(uid, EBB_VERDICT_PLAIN, true);
}

// Whether there are processes in a cgroup or below it; opened by its id, because nobody knows its path.
bool Hold::isPopulated(uint64_t cgroup) const {
  alignas(file_handle) char space[sizeof(file_handle) + sizeof(cgroup)];
  auto* handle = reinterpret_cast<file_handle*>(space);
  handle->handle_bytes = sizeof(cgroup);
  handle->handle_type = kKernfsHandle;
  std::memcpy(handle->f_handle, &cgroup, sizeof(cgroup));
  Fd directory(open_by_handle_at(cgroup_fd_, handle, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return errno != ESTALE && errno != ENOENT;
  Fd events(openat(directory.get(), "cgroup.events", O_RDONLY | O_CLOEXEC));
  char text[256] = "";
  if (!events || read(events.get(), text, sizeof(text) - 1) <= 0) return errno != ENODEV;
  return !std::strstr(text, "populated 0");
}

void Hold::forget(const std::string& uid) {
  ebb_uid key = uidKey(uid);
  bool known = !bpf_map_delete_elem(maps_.verdicts.get(), &key);
  if (!known && errno != ENOENT) throw CaptureError("forgetting what was decided about pod " + uid, errno);
  // On hosts with cgroup v1 a runtime may leave the pod's directory in cgroup2 behind. One that nobody
  // decided about and that is young may be about to begin.
  uint64_t now = bootTime();
  for (uint64_t id : keysOf<uint64_t>(maps_.newcomers.get())) {
    ebb_newcomer newcomer;
    if (bpf_map_lookup_elem(maps_.newcomers.get(), &id, &newcomer) ||
        std::memcmp(&newcomer.uid, &key, sizeof(key)))
      continue;
    if ((known || now - newcomer.since_ns > kOldNs) && !isPopulated(id))
      bpf_map_delete_elem(maps_.newcomers.get(), &id);
  }
}

void Hold::add(const Newcomer& each) {
  if (mode_ == EBB_HOLD_OFF) return;
  ebb_newcomer newcomer{};
  newcomer.uid = uidKey(each.uid);
  newcomer.since_ns = each.since_ns;
  if (bpf_map_update_elem(maps_.newcomers.get(), &each.cgroup, &newcomer, BPF_NOEXIST) && errno != EEXIST)
    throw CaptureError("taking over pod " + each.uid + " from another boot guard", errno);
}

std::vector<std::string> Hold::decided() const {
  std::vector<std::string> result;
  for (const ebb_uid& uid : keysOf<ebb_uid>(maps_.verdicts.get())) result.push_back(uidText(uid));
  return result;
}

std::vector<HeldPod> Hold::newcomers() const {
  std::vector<HeldPod> result;
  uint64_t now = bootTime();
  for (uint64_t id : keysOf<uint64_t>(maps_.newcomers.get())) {
    ebb_newcomer newcomer;
    if (bpf_map_lookup_elem(maps_.newcomers.get(), &id, &newcomer)) continue;
    ebb_decision decision{};
    bpf_map_lookup_elem(maps_.verdicts.get(), &newcomer.uid, &decision);
    HeldPod pod;
    pod.uid = uidText(newcomer.uid);
    pod.verdict = decision.verdict;
    bool free = decision.free_ns || (decision.verdict == EBB_VERDICT_NONE && mode_ != EBB_HOLD_REFUSE);
    uint64_t until = decision.free_ns ? decision.free_ns : free ? newcomer.since_ns : now;
    pod.held = !free;
    pod.age_ns = now - newcomer.since_ns;
    pod.held_ns = until > newcomer.since_ns ? until - newcomer.since_ns : 0;
    pod.refused_connects = newcomer.refused_connects;
    pod.delayed_connects = newcomer.delayed_connects;
    pod.refused_inbound = newcomer.refused_inbound;
    result.push_back(std::move(pod));
  }
  return result;
}

ebb_held Hold::sums() const {
  ebb_held sums{};
  uint32_t only = 0;
  if (bpf_map_lookup_elem(maps_.sums.get(), &only, &sums))
    throw CaptureError("reading how often new pods were held", errno);
  return sums;
}

}  // namespace ebbtide::capture
