// libbpf skeletons; the messages of libbpf, which hold the verifier's log, go into the error and not to
// stderr.
#include "programs.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>

#include "error.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "capture.skel.h"
#include "guard.skel.h"
#include "hold.skel.h"
#include "steer.skel.h"
#pragma GCC diagnostic pop

namespace ebbtide::capture {

namespace {

constexpr size_t kLogLimit = 64 * 1024;
thread_local std::string libbpf_log;

int collectLog(libbpf_print_level level, const char* format, va_list arguments) {
  if (level == LIBBPF_DEBUG) return 0;
  char line[8192];
  int size = vsnprintf(line, sizeof(line), format, arguments);
  // Of a long log the end tells what was wrong.
  if (size > 0) libbpf_log += line;
  if (libbpf_log.size() > kLogLimit) libbpf_log.erase(0, libbpf_log.size() - kLogLimit);
  return 0;
}

[[noreturn]] void fail(const std::string& tried, int error) {
  std::string hint;
  if (error == EPERM) hint = "CAP_BPF and CAP_NET_ADMIN are needed";
  if (error == EINVAL)
    hint = "the log tells which feature this kernel lacks; Linux 5.15 is the oldest supported";
  // What libbpf says where it finds none.
  if (error == ESRCH)
    hint =
        "this kernel has no BTF (/sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF), without which new pods "
        "cannot "
        "be held; use a kernel that has it, or --hold off: then pods talk in clear until they are captured";
  throw CaptureError(tried, error, hint, libbpf_log);
}

template <typename Skeleton>
void pinMaps(Skeleton* skeleton, const std::string& directory) {
  bpf_map* map;
  bpf_object__for_each_map(map, skeleton->obj) {
    if (bpf_map__is_internal(map)) continue;
    std::string path = directory + "/" + bpf_map__name(map);
    if (int error = bpf_map__set_pin_path(map, path.c_str())) fail("naming pin " + path, -error);
  }
}

// Opens, lets the caller set read-only data, loads.
template <typename Skeleton, typename Prepare>
std::unique_ptr<Skeleton, void (*)(Skeleton*)> load(const std::string& name, const std::string& directory,
                                                    Prepare prepare) {
  collectLibbpfLog();
  std::unique_ptr<Skeleton, void (*)(Skeleton*)> skeleton(Skeleton::open(), Skeleton::destroy);
  if (!skeleton) fail("opening BPF object " + name, errno);
  pinMaps(skeleton.get(), directory);
  prepare(skeleton.get());
  if (int error = Skeleton::load(skeleton.get())) fail("loading BPF object " + name, -error);
  return skeleton;
}

Fd duplicate(int fd) {
  Fd copy(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (!copy) throw CaptureError("duplicating a BPF descriptor", errno);
  return copy;
}

}  // namespace

std::vector<EmbeddedObject> embeddedObjects() {
  std::vector<EmbeddedObject> objects;
  auto add = [&](const char* name, const void* (*bytes)(size_t*)) {
    size_t size = 0;
    const void* data = bytes(&size);
    objects.push_back({name, data, size});
  };
  add("capture", capture_bpf::elf_bytes);
  add("steer", steer_bpf::elf_bytes);
  add("guard", guard_bpf::elf_bytes);
  add("hold", hold_bpf::elf_bytes);
  return objects;
}

void collectLibbpfLog() {
  static std::once_flag once;
  std::call_once(once, [] { libbpf_set_print(collectLog); });
  libbpf_log.clear();
}

const std::string& libbpfLog() {
  return libbpf_log;
}

CapturePrograms loadCapture(const std::string& map_directory) {
  auto skeleton = load<capture_bpf>("capture", map_directory, [](capture_bpf*) {});
  CapturePrograms result;
  bpf_program* program;
  bpf_object__for_each_program(program, skeleton->obj) {
    result.programs.push_back({bpf_program__name(program), bpf_program__expected_attach_type(program),
                               duplicate(bpf_program__fd(program))});
  }
  auto map = [](bpf_map* from) { return duplicate(bpf_map__fd(from)); };
  result.maps = {
      map(skeleton->maps.ebb_pods),      map(skeleton->maps.ebb_addresses), map(skeleton->maps.ebb_owners),
      map(skeleton->maps.ebb_proxies),   map(skeleton->maps.ebb_probers),   map(skeleton->maps.ebb_flows),
      map(skeleton->maps.ebb_listeners), map(skeleton->maps.ebb_ports),     map(skeleton->maps.ebb_stats)};
  result.hold_maps = {map(skeleton->maps.ebb_verdicts), map(skeleton->maps.ebb_newcomers),
                      map(skeleton->maps.ebb_hold), map(skeleton->maps.ebb_held)};
  return result;
}

HoldPrograms loadHold(const std::string& map_directory) {
  auto skeleton = load<hold_bpf>("hold", map_directory, [](hold_bpf*) {});
  HoldPrograms result;
  bpf_program* program;
  bpf_object__for_each_program(program, skeleton->obj) {
    std::string name = bpf_program__name(program);
    Fd fd = duplicate(bpf_program__fd(program));
    if (bpf_program__type(program) == BPF_PROG_TYPE_RAW_TRACEPOINT) {
      std::string section = bpf_program__section_name(program);
      result.tracepoints.push_back({name, section.substr(section.find('/') + 1), std::move(fd)});
    } else {
      result.cgroup.push_back({name, bpf_program__expected_attach_type(program), std::move(fd)});
    }
  }
  return result;
}

Fd loadSteer(const std::string& map_directory, uint64_t cookie) {
  auto skeleton = load<steer_bpf>("steer", map_directory,
                                  [&](steer_bpf* opened) { opened->rodata->pod_cookie = cookie; });
  return duplicate(bpf_program__fd(skeleton->progs.ebb_steer));
}

Fd loadGuard(const std::string& map_directory, uint64_t cookie) {
  auto skeleton = load<guard_bpf>("guard", map_directory,
                                  [&](guard_bpf* opened) { opened->rodata->pod_cookie = cookie; });
  return duplicate(bpf_program__fd(skeleton->progs.ebb_guard));
}

}  // namespace ebbtide::capture
