// What the kernel lets this process do, found out by doing it and undoing it at once: versions say little of
// distributions' kernels. Nothing of it is pinned, and all of it ends with this process.
#pragma once

#include <string>
#include <vector>

namespace ebbtide::capture {

// One attempt, named KIND:WHAT; kinds are object, map, memory, program, cgroup, netns,
// tracepoint, guard and pin.
struct Trial {
  std::string name;
  int error = 0;        // errno, 0 where it worked
  std::string message;  // what was tried and what came back
  std::string log;      // of the verifier and libbpf, where it failed
};

// Makes each of our maps, loads each of our programs, and attaches programs that do nothing to each hook: to
// `cgroup` (a directory of cgroup2; none where it is empty), to a network namespace of their own, and to the
// kernel's tracepoints. Pins a map in `bpffs` (none where it is empty) and removes the pin. Takes some 300
// ms.
std::vector<Trial> tryFeatures(const std::string& cgroup, const std::string& bpffs);

}  // namespace ebbtide::capture
