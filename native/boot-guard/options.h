// What the boot guard can be told: every flag is read here, with its default.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace ebbtide::boot_guard {

enum class Command { kGuard, kWait, kRelease };

struct Options {
  Command command = Command::kGuard;
  std::string pins;        // directory on the bpffs, as the agent of this node has it
  std::string cgroup;      // empty: the root of cgroup2 is found
  std::string pod_cgroup;  // empty: wherever a cgroup is named as a pod's
  std::string host_netns;  // empty: that of this process
  std::string report;      // file in which the agent reads what became of this; empty: none
  unsigned timeout_seconds = 20;
  // Of `wait`.
  std::string daemonset = "ebbtide-system/ebbtide-node";
  std::optional<unsigned> release_after_seconds = 600;  // empty: never
  std::string pod_logs = "/var/log/pods";
  std::vector<std::string> disable;  // files that are removed when the node was freed
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws UsageError that says what is wrong.
Options readOptions(int argc, char** argv);

extern const char* const kUsage;

}  // namespace ebbtide::boot_guard
