// What identifies a process to the BPF programs: where it runs and when it began.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace ebbtide::capture {

struct ProcessIdentity {
  uint64_t cgroup;       // id in the cgroup2 hierarchy
  uint64_t start_ticks;  // field 22 of /proc/PID/stat
};

// `cgroup_root` is a directory on a cgroup2 mount. Throws when the process is gone, or when this process does
// not see pids as the kernel's programs do (not the initial pid namespace).
ProcessIdentity identifyProcess(pid_t pid, const std::string& cgroup_root);
// 0 when there is no such process.
uint64_t processStart(pid_t pid);

}  // namespace ebbtide::capture
