// Objects are opened with all but one map or program switched off, so that each failure has a name. Maps are
// made small for the programs' trials, and in full size once.
#include "kernel_features.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <sched.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "error.h"
#include "fd.h"
#include "guard.h"
#include "netns.h"
#include "pins.h"
#include "programs.h"

namespace ebbtide::capture {

namespace {

constexpr uint32_t kTrialEntries = 16;
constexpr int kLoopback = 1;  // index of lo in every network namespace

using Object = std::unique_ptr<bpf_object, void (*)(bpf_object*)>;

// Each attempt becomes a trial, whatever happens.
class Trials {
 public:
  void attempt(const std::string& name, const std::function<void()>& work) {
    Trial trial{name, 0, "", ""};
    try {
      work();
    } catch (const CaptureError& error) {
      trial.error = error.number ? error.number : EIO;
      trial.message = error.what();
      trial.log = error.log;
    }
    trials_.push_back(std::move(trial));
  }
  std::vector<Trial> take() { return std::move(trials_); }

 private:
  std::vector<Trial> trials_;
};

Object open(const EmbeddedObject& embedded) {
  collectLibbpfLog();
  Object object(bpf_object__open_mem(embedded.bytes, embedded.size, nullptr), bpf_object__close);
  if (!object) throw CaptureError(std::string("opening BPF object ") + embedded.name, errno, "", libbpfLog());
  return object;
}

void shrinkMaps(bpf_object* object) {
  bpf_map* map;
  bpf_object__for_each_map(map, object) {
    if (!bpf_map__is_internal(map) && bpf_map__max_entries(map) > kTrialEntries)
      bpf_map__set_max_entries(map, kTrialEntries);
  }
}

void loadObject(bpf_object* object, const std::string& what) {
  if (int error = bpf_object__load(object)) throw CaptureError(what, -error, "", libbpfLog());
}

// Makes the one map of the object, or all of them in full size where it has no name.
void makeMaps(const EmbeddedObject& embedded, const std::string& only) {
  Object object = open(embedded);
  bpf_program* program;
  bpf_object__for_each_program(program, object.get()) bpf_program__set_autoload(program, false);
  if (!only.empty()) {
    shrinkMaps(object.get());
    bpf_map* map;
    bpf_object__for_each_map(map, object.get()) bpf_map__set_autocreate(map, bpf_map__name(map) == only);
  }
  loadObject(object.get(), only.empty() ? "making all maps in full size" : "making map " + only);
}

void loadProgram(const EmbeddedObject& embedded, const std::string& name) {
  Object object = open(embedded);
  shrinkMaps(object.get());
  bpf_program* program;
  bpf_object__for_each_program(program, object.get())
      bpf_program__set_autoload(program, bpf_program__name(program) == name);
  loadObject(object.get(), "loading program " + name);
}

// A program of the type that says yes to everything.
Fd loadIdle(bpf_prog_type type, int attach_type) {
  bpf_insn code[] = {
      {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .src_reg = 0, .off = 0, .imm = 1},
      {.code = BPF_JMP | BPF_EXIT, .dst_reg = 0, .src_reg = 0, .off = 0, .imm = 0}};
  bpf_prog_load_opts options{};
  options.sz = sizeof(options);
  options.expected_attach_type = static_cast<bpf_attach_type>(attach_type);
  Fd program(bpf_prog_load(type, "ebb_check", "Dual BSD/GPL", code, std::size(code), &options));
  if (!program) throw CaptureError("loading a program that does nothing", errno);
  return program;
}

struct Hook {
  std::string name;
  bpf_prog_type type;
  int attach_type;
  std::string section;
};

std::vector<Hook> hooksOf(const EmbeddedObject& embedded) {
  std::vector<Hook> hooks;
  Object object = open(embedded);
  bpf_program* program;
  bpf_object__for_each_program(program, object.get())
      hooks.push_back({bpf_program__name(program), bpf_program__type(program),
                       bpf_program__expected_attach_type(program), bpf_program__section_name(program)});
  return hooks;
}

void attachToCgroup(const Hook& hook, int cgroup_fd, const std::string& cgroup) {
  Fd program = loadIdle(hook.type, hook.attach_type);
  Fd link(bpf_link_create(program.get(), cgroup_fd, static_cast<bpf_attach_type>(hook.attach_type), nullptr));
  if (!link) throw CaptureError("attaching a program to " + cgroup + " (" + hook.section + ")", errno);
}

void attachToTracepoint(const Hook& hook, const std::string& tracepoint) {
  Fd program = loadIdle(hook.type, hook.attach_type);
  Fd link(bpf_raw_tracepoint_open(tracepoint.c_str(), program.get()));
  if (!link) throw CaptureError("attaching a program to tracepoint " + tracepoint, errno);
}

void tryObjects(Trials& trials) {
  std::set<std::string> tried;
  for (const EmbeddedObject& embedded : embeddedObjects()) {
    trials.attempt(std::string("memory:") + embedded.name, [&] { makeMaps(embedded, ""); });
    std::vector<std::string> maps, programs;
    trials.attempt(std::string("object:") + embedded.name, [&] {
      Object object = open(embedded);
      bpf_map* map;
      bpf_object__for_each_map(map, object.get()) if (!bpf_map__is_internal(map))
          maps.push_back(bpf_map__name(map));
      bpf_program* program;
      bpf_object__for_each_program(program, object.get()) programs.push_back(bpf_program__name(program));
    });
    for (const std::string& map : maps)
      if (tried.insert(map).second) trials.attempt("map:" + map, [&] { makeMaps(embedded, map); });
    for (const std::string& program : programs)
      trials.attempt(std::string("program:") + embedded.name + "/" + program,
                     [&] { loadProgram(embedded, program); });
  }
}

void tryHooks(Trials& trials, const std::string& cgroup) {
  Fd cgroup_fd(cgroup.empty() ? -1 : ::open(cgroup.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (const EmbeddedObject& embedded : embeddedObjects()) {
    for (const Hook& hook : hooksOf(embedded)) {
      if (hook.type == BPF_PROG_TYPE_RAW_TRACEPOINT) {
        std::string tracepoint = hook.section.substr(hook.section.find('/') + 1);
        trials.attempt("tracepoint:" + tracepoint, [&] { attachToTracepoint(hook, tracepoint); });
      } else if (hook.type != BPF_PROG_TYPE_SK_LOOKUP && hook.type != BPF_PROG_TYPE_SCHED_CLS && cgroup_fd) {
        trials.attempt("cgroup:" + hook.section, [&] { attachToCgroup(hook, cgroup_fd.get(), cgroup); });
      }
    }
  }
}

// A network namespace that ends with its descriptor: no packet of anybody's meets what is attached in it.
Fd makeNetns() {
  Fd netns;
  int error = 0;
  std::thread([&] {
    if (unshare(CLONE_NEWNET))
      error = errno;
    else
      netns = Fd(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
  }).join();
  if (error) throw CaptureError("making a network namespace", error, "CAP_SYS_ADMIN is needed");
  if (!netns) throw CaptureError("opening a new network namespace", EIO);
  return netns;
}

void tryNetns(Trials& trials) {
  Fd netns;
  trials.attempt("netns:new", [&] { netns = makeNetns(); });
  if (!netns) return;
  trials.attempt("netns:cookie", [&] { netnsCookie(netns.get()); });
  trials.attempt("netns:sk_lookup", [&] {
    Fd program = loadIdle(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP);
    Fd link(bpf_link_create(program.get(), netns.get(), BPF_SK_LOOKUP, nullptr));
    if (!link) throw CaptureError("attaching an sk_lookup program to a network namespace", errno);
  });
  trials.attempt("guard:tcx", [&] {
    inNetns(netns.get(), [] { tryTcx(loadIdle(BPF_PROG_TYPE_SCHED_CLS, 0).get(), kLoopback); });
  });
  trials.attempt("guard:classic", [&] {
    inNetns(netns.get(), [] { tryClassic(loadIdle(BPF_PROG_TYPE_SCHED_CLS, 0).get(), kLoopback); });
  });
}

void tryPin(Trials& trials, const std::string& bpffs) {
  trials.attempt("pin:map", [&] {
    Fd map(bpf_map_create(BPF_MAP_TYPE_ARRAY, "ebb_check", sizeof(uint32_t), sizeof(uint32_t), 1, nullptr));
    if (!map) throw CaptureError("making a map to pin", errno);
    std::string path = bpffs + "/ebbtide_check_" + std::to_string(getpid());
    pin(map.get(), path);
    unpin(path);
  });
}

}  // namespace

std::vector<Trial> tryFeatures(const std::string& cgroup, const std::string& bpffs) {
  Trials trials;
  tryObjects(trials);
  tryHooks(trials, cgroup);
  tryNetns(trials);
  if (!bpffs.empty()) tryPin(trials, bpffs);
  return trials.take();
}

}  // namespace ebbtide::capture
