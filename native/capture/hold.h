// Holding of new pods: what the agent decided of each UID, and the programs at the tracepoints by which the
// kernel sees pods appear. bpf/hold.bpf.h says what is held and why.
#pragma once

#include <capture.h>

#include <cstdint>
#include <string>
#include <vector>

#include "programs.h"

namespace ebbtide::capture {

struct HoldOptions {
  bool refuse = true;     // what becomes of pods of which nothing is decided
  std::string directory;  // cgroup below which this node's pods are; empty for all
};

struct HeldPod {
  std::string uid;
  uint32_t verdict = EBB_VERDICT_NONE;
  bool held = false;
  uint64_t age_ns = 0, held_ns = 0;
  uint64_t refused_connects = 0, delayed_connects = 0, refused_inbound = 0;
};

// A pod that appeared, as any version keeps it: cgroup id and UID.
struct Newcomer {
  uint64_t cgroup = 0;
  std::string uid;
  uint64_t since_ns = 0;  // CLOCK_BOOTTIME
};

// Those in the pins of a version; empty where there is no such map.
std::vector<Newcomer> newcomersOf(const std::string& version_directory);

// Marks of sockets that listen, taken over from another version before this one's programs are loaded:
// sockets are marked once only, when they begin to listen, and whoever does not know the mark lets everything
// in.
void shareListening(const std::string& other_version, const std::string& own_version);

class Hold {
 public:
  // Nothing is changed until begin or end is called. `root` is the directory of this version's pins,
  // `cgroup_fd` any directory of cgroup2, borrowed.
  Hold(HoldMaps maps, std::string root, int cgroup_fd);

  // Holds from here on. Programs that an earlier process attached are replaced without a gap.
  void begin(const HoldOptions& options, uint64_t node_cookie,
             const std::vector<TracepointProgram>& programs);
  // Holds nothing, and forgets all.
  void end();

  void decide(const std::string& uid, uint32_t verdict);
  void forget(const std::string& uid);
  // Of a pod that another version's programs saw appear.
  void add(const Newcomer& newcomer);
  std::vector<std::string> decided() const;
  // Of a pod that begins to be captured, and of one that is let go.
  void captured(const std::string& uid);
  void released(const std::string& uid);

  // Pods that appeared while this was watched and are still there.
  std::vector<HeldPod> newcomers() const;
  ebb_held sums() const;

 private:
  void decide(const std::string& uid, uint32_t verdict, bool free);
  bool exists(const ebb_uid& uid) const;
  bool isPopulated(uint64_t cgroup) const;

  HoldMaps maps_;
  std::string root_;
  int cgroup_fd_;
  uint32_t mode_ = EBB_HOLD_OFF;
};

}  // namespace ebbtide::capture
