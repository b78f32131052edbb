// How long the guard's refusal lasts: until an agent takes over, or until it is known that none will come.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "hold.h"
#include "options.h"

namespace ebbtide::boot_guard {

// Whether pins are still the guard's own, of whichever version.
bool isGuarding(const std::string& pins);

// Frees the node: takes the guard's programs out of the kernel. False where an agent has taken over. Throws
// CaptureError.
bool release(const std::string& pins);

// Decides whether an agent is still to be expected. The evidence is the kubelet's own: after a boot it starts
// all pods that the API has for this node. When it has been starting others for long and none of the agent's
// DaemonSet, the mesh went away while the node was off. Time alone is no evidence: an API server, a registry
// or an agent may be away for hours, and pods must not speak in clear because of that.
class Expectation {
 public:
  explicit Expectation(uint64_t patience_ns) : patience_ns_(patience_ns) {}

  // `newcomers`: pods that appeared since the boot; `agents`: UIDs of the DaemonSet's pods, of any boot.
  bool isOver(const std::vector<capture::Newcomer>& newcomers, const std::set<std::string>& agents,
              uint64_t now_ns);

 private:
  uint64_t patience_ns_;
  uint64_t since_ns_ = 0;  // others are started and no agent; 0: not so
};

// Waits. True: the node was freed; false: an agent has taken over, or nothing is guarded.
bool waitForAgent(const Options& options);

}  // namespace ebbtide::boot_guard
