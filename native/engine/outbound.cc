// Outbound connections.
#include "outbound.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "connect_headers.h"
#include "worker.h"

namespace ebbtide {
namespace {

constexpr unsigned kMaxTries = 3;
// A pod that is being enrolled refuses its HBONE port for a moment after it was announced.
constexpr unsigned kSameHopRetries = 4;
constexpr uint64_t kSameHopPauseUs = 100'000;  // then 200, 300, 400 ms: one second in all

}  // namespace

OutboundFlow::OutboundFlow(Worker& worker, PodPtr pod, Fd application)
    : Flow(worker, std::move(pod), false, 1),
      application_(worker, *this, pod_->budget),
      next_hop_(worker, *this, pod_->budget),
      timer_([this] { onTimer(); }, this) {
  application_.adopt(std::move(application), false);
}

OutboundFlow::~OutboundFlow() {
  setLoad(nullptr);
}

void OutboundFlow::begin() {
  auto source = peerAddress(application_.fd());
  auto destination = originalDestination(application_.fd());
  if (!source || !destination) {
    cut(Reason::kInternal, "the connection's addresses cannot be read");
    return;
  }
  record_.source = *source;
  record_.destination = *destination;
  worker_.loop.arm(timer_, worker_.localTimeoutUs());
  resolve();
}

void OutboundFlow::resolve() {
  if (!record_.source_workload) {
    record_.source_workload = worker_.localWorkload(*pod_);
    if (!record_.source_workload) {
      worker_.wait(*this);
      return;
    }
    auto& own = record_.source_workload->addresses;
    const auto& to = record_.destination;
    bool own_address = to.ip.isLoopback() || std::find(own.begin(), own.end(), to.ip) != own.end();
    if (own_address && isMeshPort(to.port)) {
      cut(Reason::kLoop, "the destination is the mesh's own port");
      return;
    }
  }
  route();
}

void OutboundFlow::route() {
  OutboundQuery query;
  query.source = record_.source_workload;
  query.destination = record_.destination;
  query.exclude_uids = tried_;
  route_ = worker_.state().routeOutbound(query);
  record_.destination_workload = route_.destination_workload;
  record_.service = route_.destination_service;
  if (route_.kind == OutboundRoute::Kind::kRefused) {
    cut(route_.reason, "");
    return;
  }
  setLoad(route_.destination_workload);
  // An endpoint that was tried before may have been reached otherwise than this one will be.
  mutual_tls_ = false;
  record_.hbone_address.clear();
  record_.source_identity.clear();
  record_.destination_identity.clear();
  record_.trace_id.clear();
  if (route_.kind == OutboundRoute::Kind::kPlaintext) {
    connectPlain();
    return;
  }
  record_.hbone_address = route_.next_hop.toString();
  Identity identity = record_.source_workload->identity();
  PoolTarget target{pod_, worker_.tls(identity), route_.next_hop, route_.expected_identities};
  if (!target.tls) {
    phase_ = Phase::kLocal;
    if (!timer_.armed()) worker_.loop.arm(timer_, worker_.localTimeoutUs());
    worker_.wait(*this);
    return;
  }
  if (target.expected_identities.empty()) {
    cut(Reason::kPeerIdentityMismatch, "no identity is known that the next hop may hold");
    return;
  }
  timer_.cancel();
  phase_ = Phase::kTunnel;
  mutual_tls_ = true;
  record_.source_identity = identity.uri();
  worker_.pool.acquire(target, *this);
}

void OutboundFlow::connectPlain() {
  phase_ = Phase::kPlainConnect;
  auto [fd, error] = worker_.dialFrom(*pod_, route_.next_hop, std::nullopt);
  if (!fd) {
    hopFailed(Reason::kConnectFailed, std::string("connect: ") + std::strerror(error), error);
    return;
  }
  keepAlive(fd.get());
  holdDescriptors(2);
  next_hop_.adopt(std::move(fd), true);
  worker_.loop.arm(timer_, worker_.connectTimeoutUs());
}

void OutboundFlow::onConnected(SocketEnd&, int error) {
  timer_.cancel();
  if (error != 0) {
    next_hop_.close(false);
    hopFailed(error == ECONNREFUSED ? Reason::kConnectRefused : Reason::kConnectFailed,
              std::string("connect: ") + std::strerror(error), error);
    return;
  }
  phase_ = Phase::kOpen;
  establish();
  plain_ = std::make_unique<SocketRelay>(worker_, *this, application_, next_hop_);
  plain_->start();
}

void OutboundFlow::onPoolReady(Tunnel& tunnel) {
  phase_ = Phase::kAnswer;
  record_.destination_identity = tunnel.peer().identity.uri();
  uint8_t random[24];
  worker_.randomBytes(random, sizeof random);
  std::string trace = traceparentOf(random);
  record_.trace_id = traceIdOf(trace);
  const std::string& baggage = worker_.baggage(record_.source_workload);
  std::string forwarded = forwardedOf(record_.source, record_.service);
  stream_ = std::make_unique<StreamRelay>(worker_, *this, application_);
  HeaderFields fields = {{":method", "CONNECT"}, {":authority", route_.authority}};
  if (!baggage.empty()) fields.emplace_back("baggage", baggage);
  fields.emplace_back("forwarded", forwarded);
  fields.emplace_back("traceparent", trace);
  if (!tunnel.submitConnect(*stream_, fields)) {
    hopFailed(Reason::kTunnelLost, "the tunnel takes no more streams", 0);
    return;
  }
  stream_->bind(&tunnel);  // not before: what throws above has no stream yet that its end could reset
  worker_.loop.arm(timer_, worker_.answerTimeoutUs());
}

void OutboundFlow::onPoolFailed(Reason reason, const std::string& detail, int error) {
  hopFailed(reason, detail, error);
}

// Excludes the endpoint that failed from the next choice; false where there is no other or tries are used up.
bool OutboundFlow::tryAnotherEndpoint() {
  if (!route_.can_retry || !route_.destination_workload || ++tries_ >= kMaxTries) return false;
  tried_.push_back(route_.destination_workload->uid);
  return true;
}

// No byte of the application has left yet: another endpoint, or a pod that is just being enrolled, may be
// tried.
void OutboundFlow::hopFailed(Reason reason, const std::string& detail, int error) {
  timer_.cancel();
  bool connect_failed = error != 0;
  if (connect_failed && tryAnotherEndpoint()) {
    route();
    return;
  }
  bool enrolling = error == ECONNREFUSED && route_.kind == OutboundRoute::Kind::kHbone;
  bool stale = reason == Reason::kTunnelLost;  // a pooled connection that ended under the request
  if ((enrolling && same_hop_retries_ < kSameHopRetries) || (stale && same_hop_retries_ < 1)) {
    same_hop_retries_++;
    phase_ = Phase::kRetryPause;
    worker_.loop.arm(timer_, stale ? 0 : kSameHopPauseUs * same_hop_retries_);
    return;
  }
  cut(reason, detail);
}

void OutboundFlow::onTimer() {
  switch (phase_) {
    case Phase::kLocal:
      if (record_.source_workload) {
        cut(Reason::kNoCertificate, "no certificate for " + record_.source_workload->identity().uri());
      } else {
        cut(Reason::kUnknownLocalWorkload,
            pod_->ns + "/" + pod_->name + " is not known to the control plane");
      }
      return;
    case Phase::kAnswer:
      cut(Reason::kConnectResponseTimeout, "no answer to CONNECT " + route_.authority);
      return;
    case Phase::kPlainConnect:
      next_hop_.close(false);
      hopFailed(Reason::kConnectTimeout, "no answer from " + route_.next_hop.toString(), ETIMEDOUT);
      return;
    case Phase::kRetryPause:
      route();
      return;
    case Phase::kTunnel:
    case Phase::kOpen:
      return;
  }
}

void OutboundFlow::onStreamHeader(std::string_view name, std::string_view value) {
  if (name == ":status") status_ = value.substr(0, 3);
}

void OutboundFlow::onStreamHeaders() {
  if (phase_ != Phase::kAnswer) return;
  if (status_.starts_with('1')) return;
  timer_.cancel();
  if (status_ != "200") {
    // The far proxy could not reach its application: no byte of ours has left, another endpoint may do.
    if (status_ == "503" && tryAnotherEndpoint()) {
      stream_->abandon(NGHTTP2_CANCEL);
      // Not from within the answer's callback, whose stream goes when the next one is made.
      phase_ = Phase::kRetryPause;
      worker_.loop.arm(timer_, 0);
      return;
    }
    cut(Reason::kConnectRejected, "HTTP status " + status_ + " for CONNECT " + route_.authority);
    return;
  }
  phase_ = Phase::kOpen;
  establish();
  stream_->start();
}

void OutboundFlow::onStreamRefused(uint32_t code) {
  if (code == NGHTTP2_REFUSED_STREAM) {
    hopFailed(Reason::kTunnelLost, "the peer refused the stream", 0);
  } else {
    cut(Reason::kConnectRejected, std::string("RST_STREAM ") + nghttp2_http2_strerror(code));
  }
}

void OutboundFlow::onStreamTunnelLost(Reason reason, const std::string& detail) {
  hopFailed(reason, detail, 0);
}

void OutboundFlow::onRelayEnded(Reason reason, const std::string& detail) {
  // A resetting end leaves the other socket of a plain connection closed already.
  finish(reason, detail);
}

void OutboundFlow::onBroken(SocketEnd& end, int error) {
  if (&end == &next_hop_) {
    onConnected(end, error);
  } else {
    cut(Reason::kApplicationReset, std::string("the application left: ") + std::strerror(error));
  }
}

void OutboundFlow::closeSides() {
  timer_.cancel();
  leavePool();
  setLoad(nullptr);
  if (stream_) stream_->cut(NGHTTP2_CANCEL);
  application_.close(true);
  next_hop_.close(true);
}

void OutboundFlow::setLoad(const WorkloadPtr& workload) {
  if (load_) load_->connections.fetch_sub(1, std::memory_order_relaxed);
  load_ = workload ? workload->load : nullptr;
  if (load_) load_->connections.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace ebbtide
