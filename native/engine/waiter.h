// Something that waits for the pod's own workload or certificate to arrive.
#pragma once

#include "list.h"
#include "loop.h"

namespace ebbtide {

class Waiter {
 public:
  // Workloads, policies or certificates changed: look again. Not called again unless it joins the list anew.
  virtual void onLocalChange() = 0;
  // Whom an exception of it ends.
  virtual Faultable& faultable() = 0;

 protected:
  Waiter() : waiter_hook_(this) {}
  ~Waiter() = default;

 private:
  friend class Worker;
  ListHook<Waiter> waiter_hook_;
};

}  // namespace ebbtide
