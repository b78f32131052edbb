// The BPF objects embedded in the addon: loaded against the pinned maps, handed out as descriptors of
// programs and maps.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fd.h"

namespace ebbtide::capture {

// A program for the root of cgroup2, with its attach type (enum bpf_attach_type) and the name of its pin.
struct CgroupProgram {
  std::string name;
  int attach_type;
  Fd program;
};

struct Maps {
  Fd pods, addresses, owners, proxies, probers, flows, listeners, ports, stats;
};

struct HoldMaps {
  Fd verdicts, newcomers, settings, sums;
};

// A program for a tracepoint of the kernel.
struct TracepointProgram {
  std::string name, tracepoint;
  Fd program;
};

struct HoldPrograms {
  std::vector<CgroupProgram> cgroup;
  std::vector<TracepointProgram> tracepoints;
};

struct CapturePrograms {
  std::vector<CgroupProgram> programs;
  Maps maps;
  HoldMaps hold_maps;
};

// A compiled BPF object as it is in the addon.
struct EmbeddedObject {
  const char* name;
  const void* bytes;
  size_t size;
};
std::vector<EmbeddedObject> embeddedObjects();

// Collects what libbpf says on this thread, from here on; it is never printed.
void collectLibbpfLog();
const std::string& libbpfLog();

// Loads the cgroup programs; maps are taken from `map_directory` (on a bpffs) or made and pinned there.
CapturePrograms loadCapture(const std::string& map_directory);
// Programs that hold new pods, against the same maps. They need the kernel's BTF and CAP_PERFMON.
HoldPrograms loadHold(const std::string& map_directory);
// sk_lookup program of one pod.
Fd loadSteer(const std::string& map_directory, uint64_t cookie);
// tc ingress program of one pod.
Fd loadGuard(const std::string& map_directory, uint64_t cookie);

}  // namespace ebbtide::capture
