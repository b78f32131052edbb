// A pod of this node as all workers share it.
#pragma once

#include <atomic>

#include "bytes.h"
#include "engine.h"
#include "socket.h"

namespace ebbtide {

struct Pod {
  explicit Pod(BufferBudget& whole) : budget(whole) {}

  std::string uid, name, ns, service_account;
  Fd netns;
  // The capture program rewrites binds, so a dial may claim the client's port; without it only its address.
  bool claims = false;
  // What this pod's connections hold, of all workers: bytes for slow applications, and descriptors.
  BufferBudget budget;
  std::atomic<uint32_t> descriptors{0};
};

using PodPtr = std::shared_ptr<Pod>;

// One worker's listeners of a pod.
struct PodListeners {
  Fd outbound, plaintext, hbone;
};

}  // namespace ebbtide
