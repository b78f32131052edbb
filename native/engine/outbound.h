// A connection that a pod's application opened: from the captured socket, by the mesh's routing, to a tunnel
// or to a plain next hop.
#pragma once

#include <memory>
#include <optional>

#include "flow.h"
#include "pool.h"
#include "waiter.h"

namespace ebbtide {

class OutboundFlow final : public Flow, private SocketEnd::User, private PoolWaiter, private Waiter {
 public:
  OutboundFlow(Worker& worker, PodPtr pod, Fd application);
  ~OutboundFlow() override;
  void begin();

 private:
  void onLocalChange() override {
    if (!finished()) resolve();
  }
  Faultable& faultable() override { return *this; }
  void onUnusable(SocketEnd&, const char* what) override { onFault(what); }
  void onConnected(SocketEnd& end, int error) override;
  void onBroken(SocketEnd& end, int error) override;
  void onPoolReady(Tunnel& tunnel) override;
  void onPoolFailed(Reason reason, const std::string& detail, int error) override;
  void onStreamHeader(std::string_view name, std::string_view value) override;
  void onStreamHeaders() override;
  void onStreamRefused(uint32_t code) override;
  void onStreamTunnelLost(Reason reason, const std::string& detail) override;
  void onRelayEnded(Reason reason, const std::string& detail) override;
  void closeSides() override;

  void resolve();
  void route();
  void connectPlain();
  bool tryAnotherEndpoint();
  void hopFailed(Reason reason, const std::string& detail, int error);
  void setLoad(const WorkloadPtr& workload);
  void onTimer();

  SocketEnd application_, next_hop_;
  std::unique_ptr<StreamRelay> stream_;
  std::unique_ptr<SocketRelay> plain_;
  OutboundRoute route_;
  std::vector<std::string> tried_;
  std::shared_ptr<EndpointLoad> load_;
  std::string status_;
  unsigned tries_ = 0, same_hop_retries_ = 0;
  enum class Phase : uint8_t {
    kLocal,
    kTunnel,
    kAnswer,
    kPlainConnect,
    kRetryPause,
    kOpen
  } phase_ = Phase::kLocal;
  Timer timer_;
};

}  // namespace ebbtide
