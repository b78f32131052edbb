// Connections that arrive at a pod: HBONE tunnels with their streams, and plain TCP. Policy decides before
// the application is dialled.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "flow.h"
#include "handshakes.h"
#include "tunnel.h"
#include "waiter.h"

namespace ebbtide {

// One HBONE connection to a pod of this node.
class ServerTunnel final : public Tunnel, private Waiter {
 public:
  ServerTunnel(Worker& worker, PodPtr pod, std::shared_ptr<Handshakes> handshakes);
  void begin(Fd fd);
  // GOAWAY now, the final one shortly after; streams that are open go on.
  void drain();
  bool drained() const { return closed() || final_goaway_sent_; }

  const SocketAddress& client() const { return client_; }
  const SocketAddress& local() const { return local_; }

 private:
  void onLocalChange() override { prepare(); }
  Faultable& faultable() override { return *this; }
  void onConnected(int) override {}
  void onOpen() override {
    endHandshake();
    if (draining_) announceEnd();
  }
  void onRequest(int32_t stream) override;
  void onEnded(Reason reason, const std::string& detail, bool opened) override;
  void prepare();
  void onLocalTimeout();

  SocketAddress client_, local_;
  WorkloadPtr workload_;
  void endHandshake() { handshakes_->leave(place_); }
  void announceEnd();

  Timer local_timer_, goaway_timer_;
  std::shared_ptr<Handshakes> handshakes_;
  Handshakes::Place place_;
  bool draining_ = false, final_goaway_sent_ = false;
  uint64_t started_us_;
};

// What both kinds of inbound connection do: authorize, dial the application showing it the client.
class InboundFlow : public Flow, protected SocketEnd::User {
 public:
  bool stillAllowed(std::string& policy) override;

 protected:
  InboundFlow(Worker& worker, PodPtr pod, uint32_t descriptors);
  // False: denied, reason and detail say by what.
  bool authorize(Reason& reason, std::string& detail);
  // Starts connecting to record_.destination's application; onApplication() is called, also for an immediate
  // error.
  void dialApplication(const SocketAddress& to, const std::optional<SocketAddress>& claim);
  virtual void onApplication(int error) = 0;
  void onConnected(SocketEnd& end, int error) override;
  void onUnusable(SocketEnd&, const char* what) override { onFault(what); }

  SocketEnd application_;
  std::optional<Identity> peer_;
  Timer timer_;
};

// One stream of a ServerTunnel.
class InboundStreamFlow final : public InboundFlow {
 public:
  InboundStreamFlow(Worker& worker, ServerTunnel& tunnel);
  StreamHandler& stream() { return relay_; }

 private:
  void onStreamHeader(std::string_view name, std::string_view value) override;
  void onStreamHeaders() override;
  void onStreamRefused(uint32_t code) override;
  void onStreamTunnelLost(Reason reason, const std::string& detail) override;
  void onApplication(int error) override;
  void onBroken(SocketEnd& end, int error) override;
  void closeSides() override;
  void refuse(int status, Reason reason, const std::string& detail);
  std::optional<SocketAddress> claimedClient() const;

  StreamRelay relay_;
  SocketAddress tunnel_client_, tunnel_local_, proxy_destination_;
  std::string method_, authority_, forwarded_;
  size_t header_bytes_ = 0;
  bool proxy_header_ = false, headers_done_ = false;
};

// Plain TCP to a pod.
class InboundPlainFlow final : public InboundFlow, private Waiter {
 public:
  InboundPlainFlow(Worker& worker, PodPtr pod, Fd client);
  void begin();

 private:
  void onLocalChange() override {
    if (!finished()) resolve();
  }
  Faultable& faultable() override { return *this; }
  void onApplication(int error) override;
  void onBroken(SocketEnd& end, int error) override;
  void closeSides() override;
  void resolve();

  SocketEnd client_;
  std::unique_ptr<SocketRelay> relay_;
};

}  // namespace ebbtide
