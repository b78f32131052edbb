// Which BPF programs are attached where, by whomever: asked, never changed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ebbtide::capture {

// Programs of one hook in one place.
struct AttachedPrograms {
  std::string hook;           // "connect4", "sk_lookup", "tcx ingress", ...
  uint32_t attach_flags = 0;  // BPF_F_ALLOW_*: with ALLOW_MULTI several programs may share the place
  std::vector<uint32_t> programs;
};

// Of a directory of cgroup2 itself, at the hooks that capture uses; hooks without a program are left out.
std::vector<AttachedPrograms> attachedToCgroup(const std::string& path);

// A link that is attached to a cgroup, a network namespace or an interface.
struct BpfLink {
  uint32_t id = 0;
  uint32_t program = 0;
  std::string kind;     // "cgroup", "netns", "tcx"
  uint64_t target = 0;  // cgroup id, inode of the namespace, index of the interface; 0 when that is gone
  uint32_t attach_type = 0;
};
std::vector<BpfLink> bpfLinks();

struct BpfProgram {
  uint32_t id = 0;
  std::string name;
  uint32_t type = 0;
  uint32_t uid = 0;  // of the user who loaded it
};
// Name empty where the program is gone.
BpfProgram bpfProgram(uint32_t id);

// Programs that see what comes out of a pod's veth on the host side, in order; interfaces of other kinds too.
struct InterfacePrograms {
  std::string interface;
  int index = 0;
  std::string how;        // "tcx" or "tc"
  uint32_t priority = 0;  // of a tc filter
  uint32_t program = 0;
};
std::vector<InterfacePrograms> ingressPrograms(int netns_fd);

// Ids of all programs and links that are pinned below a directory.
struct PinnedObjects {
  std::vector<uint32_t> programs, links;
};
PinnedObjects pinnedObjects(const std::string& directory);

}  // namespace ebbtide::capture
