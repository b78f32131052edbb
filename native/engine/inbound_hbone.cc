// HBONE into a pod: the tunnel's TLS as the pod, and CONNECT streams to its application.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "connect_headers.h"
#include "inbound.h"
#include "worker.h"

namespace ebbtide {
namespace {

constexpr size_t kMaxHeaderBytes = 65'536;
constexpr size_t kMaxLoggedAuthority = 300;  // a host name of 253, a port, and room to see what was wrong
// Streams that were under way when GOAWAY was sent may still arrive for this long.
constexpr uint64_t kGoawayGraceUs = 200'000;

}  // namespace

ServerTunnel::ServerTunnel(Worker& worker, PodPtr pod, std::shared_ptr<Handshakes> handshakes)
    : Tunnel(worker, std::move(pod), true),
      local_timer_([this] { onLocalTimeout(); }, this),
      goaway_timer_(
          [this] {
            nghttp2_submit_goaway(h2_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(h2_),
                                  NGHTTP2_NO_ERROR, nullptr, 0);
            final_goaway_sent_ = true;
            going_away_ = true;
            markDirty();
          },
          this),
      handshakes_(std::move(handshakes)),
      place_(this),
      started_us_(worker.loop.nowUs()) {}

void ServerTunnel::begin(Fd fd) {
  auto client = peerAddress(fd.get());
  auto local = originalDestination(fd.get());
  if (client) client_ = *client;
  if (local) local_ = *local;
  adopt(std::move(fd), false);
  if (!client || !local) {
    close(Reason::kInternal, "the connection's addresses cannot be read");
    return;
  }
  while (ServerTunnel* oldest = handshakes_->crowded(client_.ip)) {
    oldest->close(Reason::kTooManyConnections, "too many unfinished handshakes: this was the oldest");
  }
  handshakes_->enter(place_, client_.ip);
  worker_.loop.arm(local_timer_, worker_.localTimeoutUs());
  prepare();
}

void ServerTunnel::prepare() {
  if (closed()) return;
  workload_ = worker_.localWorkload(*pod_);
  auto context = workload_ ? worker_.tls(workload_->identity()) : nullptr;
  if (!context) {
    watchEnd();
    worker_.wait(*this);
    return;
  }
  local_timer_.cancel();
  startTls(std::move(context));
}

void ServerTunnel::onLocalTimeout() {
  if (workload_) {
    close(Reason::kNoCertificate, "no certificate for " + workload_->identity().uri());
  } else {
    close(Reason::kUnknownLocalWorkload, pod_->ns + "/" + pod_->name + " is not known to the control plane");
  }
}

void ServerTunnel::onRequest(int32_t stream) {
  auto* flow = new InboundStreamFlow(worker_, *this);  // owned by the worker's list until it finishes
  attach(flow->stream(), stream);
}

void ServerTunnel::drain() {
  if (draining_ || closed()) return;
  draining_ = true;
  // A client whose handshake has begun would take its end for a failure; it is told once there is HTTP/2.
  if (h2_ != nullptr) announceEnd();
}

void ServerTunnel::announceEnd() {
  nghttp2_submit_shutdown_notice(h2_);
  worker_.loop.arm(goaway_timer_, kGoawayGraceUs);
  markDirty();
}

void ServerTunnel::onEnded(Reason reason, const std::string& detail, bool opened) {
  local_timer_.cancel();
  goaway_timer_.cancel();
  endHandshake();
  if (!opened && reason != Reason::kNone) {
    worker_.stats.handshake_failures.fetch_add(1, std::memory_order_relaxed);
    worker_.loop.guard("record", nullptr, [&] {
      AccessRecord record;
      record.inbound = true;
      record.reason = reason;
      record.detail = detail;
      record.source = client_;
      record.destination = local_;
      record.destination_workload = workload_;
      record.source_workload = worker_.state().workloadByIp(client_.ip);
      record.duration_us = worker_.loop.nowUs() - started_us_;
      worker_.recordFailure(std::move(record));
    });
  }
  worker_.disown(*this);
}

InboundStreamFlow::InboundStreamFlow(Worker& worker, ServerTunnel& tunnel)
    : InboundFlow(worker, tunnel.pod(), 1),
      relay_(worker, *this, application_),
      tunnel_client_(tunnel.client()),
      tunnel_local_(tunnel.local()) {
  peer_ = tunnel.peer().identity;
  mutual_tls_ = true;
  record_.source = tunnel_client_;
  record_.destination = tunnel_local_;
  record_.source_identity = peer_->uri();
  relay_.bind(&tunnel);  // last: what throws before has no stream yet that its end could reset
}

void InboundStreamFlow::onStreamHeader(std::string_view name, std::string_view value) {
  if (headers_done_) return;                         // trailers
  header_bytes_ += name.size() + value.size() + 32;  // as RFC 9113 counts a header list
  if (header_bytes_ > kMaxHeaderBytes) return;
  if (name == ":method") {
    method_ = value;
  } else if (name == ":authority") {
    authority_ = value;
  } else if (name == "forwarded" && forwarded_.size() + value.size() < 1024) {
    forwarded_ = value;
  } else if (name == "traceparent") {
    record_.trace_id = traceIdOf(value);
  }
}

void InboundStreamFlow::onStreamHeaders() {
  if (headers_done_) return;
  headers_done_ = true;
  // The log is not a place where a peer may put as much as it likes.
  record_.hbone_address = authority_.substr(0, kMaxLoggedAuthority);
  auto workload = worker_.localWorkload(*pod_);
  if (!workload) {
    refuse(503, Reason::kUnknownLocalWorkload,
           pod_->ns + "/" + pod_->name + " is not known to the control plane");
    return;
  }
  record_.destination_identity = workload->identity().uri();
  auto source = worker_.state().workloadByIp(tunnel_client_.ip);
  if (source && source->identity() == *peer_) record_.source_workload = source;
  if (method_ != "CONNECT" || authority_.empty() || header_bytes_ > kMaxHeaderBytes) {
    refuse(400, Reason::kBadRequest,
           method_ == "CONNECT" ? "no usable authority" : "the method is not CONNECT");
    return;
  }
  auto target = worker_.state().resolveInbound({workload, tunnel_local_.ip, authority_, forwarded_});
  record_.destination_workload = workload;
  record_.service = target.service;
  if (target.reason != Reason::kNone) {
    refuse(target.http_status, target.reason, "CONNECT " + record_.hbone_address);
    return;
  }
  record_.destination = target.application;
  proxy_header_ = target.send_proxy_header;
  proxy_destination_ = target.proxy_destination;
  if (!worker_.admits(*pod_)) {
    refuse(503, Reason::kTooManyConnections, "the pod's share of the proxy's descriptors is used up");
    return;
  }
  Reason reason;
  std::string detail;
  if (!authorize(reason, detail)) {
    refuse(401, reason, detail);
    return;
  }
  if (proxy_header_) {
    // The PROXY header tells who the client is; the connection itself stays inside the pod.
    static const IpAddress v4 = *IpAddress::parse("127.0.0.1"), v6 = *IpAddress::parse("::1");
    dialApplication({target.application.ip.v4 ? v4 : v6, target.application.port}, std::nullopt);
  } else {
    dialApplication(target.application, claimedClient());
  }
}

// The client as the application shall see it: always the tunnel's own address, which the network vouches for;
// its port from `forwarded`, when that speaks of the same address.
std::optional<SocketAddress> InboundStreamFlow::claimedClient() const {
  SocketAddress claim = tunnel_client_;
  auto named = forwardedFor(forwarded_);
  if (named && named->ip == claim.ip) claim.port = named->port;
  return claim;
}

void InboundStreamFlow::onApplication(int error) {
  if (error != 0) {
    Reason reason = error == ECONNREFUSED ? Reason::kConnectRefused
                    : error == ETIMEDOUT  ? Reason::kConnectTimeout
                                          : Reason::kConnectFailed;
    refuse(503, reason,
           "connect to the application: " + record_.destination.toString() + ": " + std::strerror(error));
    return;
  }
  if (proxy_header_) {
    std::string header = proxyHeader(tunnel_client_, proxy_destination_, record_.source_identity);
    // A new connection's buffer holds it; whatever the client already sent is queued and comes after.
    if (!application_.writeFirst(header.data(), header.size())) {
      refuse(503, Reason::kConnectFailed, "the PROXY header could not be written");
      return;
    }
  }
  const std::string& baggage = worker_.baggage(record_.destination_workload);
  HeaderFields fields = {{":status", "200"}};
  if (!baggage.empty()) fields.emplace_back("baggage", baggage);
  relay_.tunnel()->submitAnswer(relay_, fields, false);
  establish();
  relay_.start();
}

void InboundStreamFlow::refuse(int status, Reason reason, const std::string& detail) {
  if (finished()) return;
  std::string code = std::to_string(status);
  if (Tunnel* tunnel = relay_.tunnel()) {
    tunnel->submitAnswer(relay_, {{":status", code}}, true);
    relay_.letGo();  // no RST_STREAM: the library would drop the answer for it; the client ends the stream
  }
  cut(reason, detail);
}

void InboundStreamFlow::onStreamRefused(uint32_t code) {
  if (!headers_done_) {
    // The library reset the stream: what it received is no request of HTTP at all.
    cut(Reason::kBadRequest, "the request is malformed HTTP/2");
    return;
  }
  cut(Reason::kApplicationReset, std::string("the client left: RST_STREAM ") + nghttp2_http2_strerror(code));
}

void InboundStreamFlow::onStreamTunnelLost(Reason reason, const std::string& detail) {
  cut(reason, detail);
}

void InboundStreamFlow::onBroken(SocketEnd& end, int error) {
  onConnected(end, error);
}

void InboundStreamFlow::closeSides() {
  timer_.cancel();
  relay_.cut(NGHTTP2_CANCEL);
  application_.close(true);
}

}  // namespace ebbtide
