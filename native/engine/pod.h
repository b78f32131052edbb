// A pod of this node as all workers share it.
#pragma once

#include "engine.h"
#include "socket.h"

namespace ebbtide {

struct Pod {
  std::string uid, name, ns, service_account;
  Fd netns;
  // The capture program rewrites binds, so a dial may claim the client's port; without it only its address.
  bool claims = false;
};

using PodPtr = std::shared_ptr<Pod>;

// One worker's listeners of a pod.
struct PodListeners {
  Fd outbound, plaintext, hbone;
};

}  // namespace ebbtide
