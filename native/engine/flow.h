// One connection of an application as the mesh sees it: its record, its counters, its end. Base of the three
// kinds.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "list.h"
#include "loop.h"
#include "pod.h"
#include "relay.h"

namespace ebbtide {

class Worker;

class Flow : public Disposable, public Faultable, public RelayOwner {
 public:
  ~Flow() override;

  const PodPtr& pod() const { return pod_; }
  // Ends it now: RST to the application, RST_STREAM to the other side, one record.
  void cut(Reason reason, const std::string& detail);
  // Inbound: false once policy does not allow it any more. Others: always true.
  virtual bool stillAllowed(std::string& /*policy*/) { return true; }
  ConnectionInfo info() const;

  void fromApplication(size_t n) override;
  void toApplication(size_t n) override;
  void onRelayEnded(Reason reason, const std::string& detail) override { finish(reason, detail); }
  void onFault(const char* what) override;
  Faultable& faultable() override { return *this; }

 protected:
  // `descriptors`: how many it holds for now.
  Flow(Worker& worker, PodPtr pod, bool inbound, uint32_t descriptors);

  // Closes both sides, hard. Called once by cut().
  virtual void closeSides() = 0;
  // Counts it as opened; bytes may flow from now on.
  void establish();
  // Writes the record and disposes of the flow. Its sides are closed already.
  void finish(Reason reason, const std::string& detail);
  bool finished() const { return finished_; }
  // The flow holds `n` descriptors, at least as many as before.
  void holdDescriptors(uint32_t n);

  Worker& worker_;
  PodPtr pod_;
  AccessRecord record_;
  bool mutual_tls_ = false;

 private:
  friend class Worker;
  ListHook<Flow> hook_;
  TrafficSeries* series_ = nullptr;
  uint64_t started_us_;
  uint32_t descriptors_;
  bool finished_ = false;
};

}  // namespace ebbtide
