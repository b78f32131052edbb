// TCP and TLS side of an HBONE connection: sockets, handshake, gathering and flushing, keepalive, ending. The
// HTTP/2 callbacks are in tunnel_h2.cc.
#include "tunnel.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tunnel_internal.h"
#include "worker.h"

namespace ebbtide {
namespace {

// Frames that wait in the library; a peer that reads leaves a few for each of its 200 streams, and 1000
// PINGs.
constexpr size_t kMaxQueuedFrames = 4096;
// A peer whose data still comes gets this many times the time for its PING's answer: it may be queued behind
// much of that data on a slow link.
constexpr uint64_t kBusyPingTimeouts = 3;

// Whether the other end's kernel was heard of in that time: it also answers where the window is closed.
bool acknowledges(int fd, uint64_t within_us) {
  tcp_info info{};
  socklen_t size = sizeof(info);
  return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0 ||
         uint64_t{info.tcpi_last_ack_recv} * 1000 < within_us;
}

}  // namespace

Tunnel::Tunnel(Worker& worker, std::shared_ptr<Pod> pod, bool server)
    : worker_(worker),
      pod_(std::move(pod)),
      tls_(worker.blocks),
      server_(server),
      dirty_hook_(this),
      phase_timer_(
          [this] {
            if (opened_) {
              keepalive();
            } else if (connecting_) {
              onConnected(ETIMEDOUT);
            } else {
              close(Reason::kTlsHandshakeTimeout, "the TLS handshake took too long");
            }
          },
          this) {
  worker_.hold(*pod_, 1);
}

Tunnel::~Tunnel() {
  worker_.release(*pod_, 1);
  nghttp2_session_del(h2_);
}

void Tunnel::adopt(Fd fd, bool connecting) {
  fd_ = std::move(fd);
  connecting_ = connecting;
  if (!connecting) return;
  watch(EPOLLOUT);
  worker_.loop.arm(phase_timer_, worker_.connectTimeoutUs());
}

void Tunnel::watchEnd() {
  if (!watched_) watch(0);
}

void Tunnel::watch(uint32_t events) {
  if (watched_) {
    worker_.loop.modify(fd_.get(), events, *this);
  } else {
    watched_ = true;
    worker_.loop.add(fd_.get(), events, *this);
  }
}

void Tunnel::startTls(std::shared_ptr<const TlsContext> context) {
  if (!tls_.begin(std::move(context), server_)) {
    close(Reason::kInternal, "no memory for TLS");
    return;
  }
  worker_.loop.arm(phase_timer_, worker_.tlsTimeoutUs());
  last_receive_us_ = worker_.loop.nowUs();
  watch(EPOLLIN);
  if (!server_) {
    if (tls_.handshake() == TlsStream::Status::kFailed) {  // produces ClientHello
      close(Reason::kInternal, tls_.error());
      return;
    }
    writeSocket();
  }
}

void Tunnel::onEvents(uint32_t events) {
  if (!fd_) return;
  if (connecting_) {
    int error = takeSocketError(fd_.get());
    connecting_ = false;
    phase_timer_.cancel();
    onConnected(error);
    return;
  }
  if (!tls_.begun()) {
    // Still waiting for the pod's certificate, so not reading: only the end of the connection is reported.
    // What a peer sent before it reset the connection could be read, and nobody is there to take it.
    close(Reason::kTlsHandshakeFailed, "the peer left before the handshake");
    return;
  }
  if (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) readSocket();
  if (fd_ && (events & EPOLLOUT)) {
    writeSocket();
    if (fd_) markDirty();
  }
}

void Tunnel::onFault(const char* what) {
  fatal_ = true;  // whatever was under way in the library is not taken up again
  std::string detail;
  try {
    detail = what;
  } catch (const std::bad_alloc&) {  // then without
  }
  close(Reason::kInternal, detail);
}

// Resets of streams that carry bytes are what applications do all day, a hundred of them share a tunnel, and
// the number of open streams bounds them. Requests that are taken back unanswered cost us a dial each and the
// peer nothing (CVE-2023-44487).
void Tunnel::countCancelled() {
  constexpr uint32_t kCancelledBurst = 1000, kCancelledPerSecond = 100;
  uint64_t now = worker_.loop.nowUs();
  uint64_t leaked = (now - cancelled_us_) * kCancelledPerSecond / 1'000'000;
  if (leaked > 0) {
    cancelled_ -= static_cast<uint32_t>(std::min<uint64_t>(cancelled_, leaked));
    cancelled_us_ = now;
  }
  if (++cancelled_ > kCancelledBurst) flooded_ = true;
}

void Tunnel::readSocket() {
  uint8_t* buffer = worker_.receive_buffer.get();
  size_t carried = tls_.carried();
  ssize_t n = recv(fd_.get(), buffer + carried, kReceiveBytes - carried, 0);
  if (n < 0) {
    if (errno == EAGAIN || errno == EINTR) return;
    close(opened_ ? Reason::kTunnelLost : Reason::kTlsHandshakeFailed,
          std::string("read: ") + std::strerror(errno));
    return;
  }
  if (n == 0) {
    close(opened_ ? Reason::kTunnelLost : Reason::kTlsHandshakeFailed, "the peer closed the connection");
    return;
  }
  last_receive_us_ = worker_.loop.nowUs();
  tls_.restore(buffer);
  tls_.feed(buffer, carried + static_cast<size_t>(n));
  if (!tls_.established()) {
    auto status = tls_.handshake();
    writeSocket();
    if (!fd_) return;
    if (status == TlsStream::Status::kWantInput) return;
    if (status != TlsStream::Status::kDone) {
      auto& peer = tls_.peer();
      Reason reason = peer.failure != Reason::kNone ? peer.failure : Reason::kTlsHandshakeFailed;
      if (peer.failure == Reason::kNone && server_ && tls_.error() == "peer did not return a certificate") {
        reason = Reason::kPeerUntrusted;
      }
      close(reason, peer.failure != Reason::kNone ? peer.detail : tls_.error());
      return;
    }
    if (!startHttp2()) return;
  }
  newest_before_turn_ = nghttp2_session_get_last_proc_stream_id(h2_);
  // Each record is decrypted where it lies and parsed; the streams' data goes out when all were.
  auto status = TlsStream::Status::kWantInput;
  ssize_t taken = 0;
  uint8_t* data = nullptr;
  size_t size = 0;
  while (taken >= 0 && !flooded_ && (status = tls_.next(data, size)) == TlsStream::Status::kDone) {
    taken = nghttp2_session_mem_recv(h2_, data, size);
    // Answers to a peer that asks and does not read them.
    if (nghttp2_session_get_outbound_queue_size(h2_) > kMaxQueuedFrames) flooded_ = true;
  }
  while (auto* handler = data_.popFront()) {
    worker_.loop.guard("stream", &handler->faultable(), [handler] { handler->onTurnData(); });
  }
  if (!fd_) return;
  if (flooded_) {
    close(Reason::kTunnelLost, "the peer floods this connection with requests");
    return;
  }
  if (taken < 0) {
    close(Reason::kTunnelLost, std::string("HTTP/2: ") + nghttp2_strerror(static_cast<int>(taken)));
    return;
  }
  if (status != TlsStream::Status::kWantInput) {
    // A server's objection to the client's certificate comes only after the client thought itself done.
    bool refused = status == TlsStream::Status::kFailed && !server_ && !peer_settings_;
    close(refused ? Reason::kTlsHandshakeFailed : Reason::kTunnelLost,
          tls_.error().empty() ? "the peer ended the TLS connection" : tls_.error());
    return;
  }
  if (credit_changed_) resumeBlocked();
  markDirty();
}

bool Tunnel::startHttp2() {
  if (!tls_.negotiatedH2()) {
    close(Reason::kH2HandshakeFailed, "the peer does not speak HTTP/2 (ALPN h2)");
    return false;
  }
  worker_.stats.handshakes.fetch_add(1, std::memory_order_relaxed);
  if (int error = createSession(&h2_, server_, worker_.config(), this); error != 0) {
    close(Reason::kInternal, std::string("HTTP/2: ") + nghttp2_strerror(error));
    return false;
  }
  opened_ = true;
  worker_.stats.hbone_connections.fetch_add(1, std::memory_order_relaxed);
  progress_us_ = answered_us_ = worker_.loop.nowUs();
  worker_.loop.arm(phase_timer_, worker_.pingIntervalUs() / 2);
  onOpen();
  if (fd_) markDirty();
  return static_cast<bool>(fd_);
}

void Tunnel::keepalive() {
  const uint64_t now = worker_.loop.nowUs(), timeout = worker_.pingTimeoutUs();
  worker_.loop.arm(phase_timer_, worker_.pingIntervalUs() / 2);
  // A peer that sends and does not read: what we wrote stays with our kernel.
  int unacknowledged = 0;
  if (ioctl(fd_.get(), SIOCOUTQ, &unacknowledged) != 0) unacknowledged = 0;
  uint64_t taken = written_ - std::min<uint64_t>(written_, static_cast<uint64_t>(unacknowledged));
  bool nothing_waits = unacknowledged == 0 && tls_.output().size() == 0;
  if (nothing_waits || taken > taken_) {
    taken_ = std::max(taken, taken_);
    progress_us_ = now;
  } else if (now - progress_us_ >= timeout) {
    stalled(acknowledges(fd_.get(), timeout) ? "the peer does not read"
                                             : "nothing that is sent to the peer is acknowledged");
    return;
  }
  if (ping_us_ != 0) {
    if (taken < ping_end_) ping_us_ = now;  // on a slow way: its time begins when it has arrived
    bool busy = now - last_receive_us_ < timeout;
    if (now - ping_us_ >= timeout * (busy ? kBusyPingTimeouts : 1)) stalled("the peer did not answer PING");
    return;
  }
  if (now - answered_us_ < worker_.pingIntervalUs()) return;
  nghttp2_submit_ping(h2_, NGHTTP2_FLAG_NONE, nullptr);
  ping_us_ = now;
  ping_queued_ = true;
  markDirty();
}

// Not an orderly end: what the kernel still holds for such a peer would stay there for minutes.
void Tunnel::stalled(const char* detail) {
  resetOnClose(fd_.get());
  close(Reason::kTunnelLost, detail);
}

void Tunnel::markDirty() {
  worker_.dirty_tunnels.pushBack(dirty_hook_);
}

void Tunnel::flush() {
  if (!fd_) return;
  if (h2_ != nullptr && opened_) {
    pump();
    flushStage();
    if (ping_queued_) ping_end_ = written_ + tls_.output().size();
    ping_queued_ = false;
  }
  if (!fatal_) writeSocket();
  if (fatal_ && fd_) {
    close(Reason::kTunnelLost, tls_.error().empty() ? "HTTP/2 failed" : tls_.error());
    return;
  }
  if (fd_) closeIfFinished();
}

void Tunnel::writeSocket() {
  Output& output = tls_.output();
  if (output.size() > 0) {
    bool was_saturated = saturated();
    size_t before = output.size();
    int error = output.writeTo(fd_.get());
    written_ += before - output.size();
    if (error != 0) {
      close(opened_ ? Reason::kTunnelLost : Reason::kTlsHandshakeFailed,
            std::string("write: ") + std::strerror(error));
      return;
    }
    if (was_saturated && !saturated()) credit_changed_ = true;
  }
  wantWrite(output.size() > 0);
  if (credit_changed_) resumeBlocked();
}

void Tunnel::wantWrite(bool want) {
  if (want == writing_) return;
  writing_ = want;
  watch(want ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

void Tunnel::resumeBlocked() {
  credit_changed_ = false;
  if (saturated()) return;
  List<StreamHandler> waiting;
  blocked_.moveTo(waiting);
  while (auto* handler = waiting.popFront()) {
    worker_.loop.guard("stream", &handler->faultable(), [handler] { handler->onWritable(); });
  }
}

void Tunnel::closeIfFinished() {
  if (h2_ == nullptr) return;
  bool idle = nghttp2_session_want_read(h2_) == 0 && nghttp2_session_want_write(h2_) == 0;
  bool left = going_away_ && stream_count_ == 0 && nghttp2_session_want_write(h2_) == 0;
  if ((idle || left) && tls_.output().size() == 0) close(Reason::kNone, "");
}

void Tunnel::close(Reason reason, const std::string& detail) {
  if (ended_) return;
  ended_ = true;
  bool opened = opened_;
  going_away_ = true;
  if (opened) {
    opened_ = false;
    worker_.stats.hbone_connections.fetch_sub(1, std::memory_order_relaxed);
    if (!fatal_ && !pumping_ && tls_.output().size() == 0) {
      // A farewell, which memory may be too short for.
      worker_.loop.guard("tunnel", nullptr, [&] {
        nghttp2_session_terminate_session(h2_, reason == Reason::kNone || reason == Reason::kDrained
                                                   ? NGHTTP2_NO_ERROR
                                                   : NGHTTP2_INTERNAL_ERROR);
        pump();
        flushStage();
        tls_.close();
      });
    }
  }
  phase_timer_.cancel();
  if (fd_) {
    (void)tls_.output().writeTo(fd_.get());  // as far as it goes: an alert, or the end just written
    worker_.loop.remove(fd_.get(), *this);
    fd_.reset();
  }
  dirty_hook_.unlink();
  closeStreams(reason == Reason::kNone ? Reason::kTunnelLost : reason, detail);
  onEnded(reason, detail, opened);
}

void Tunnel::closeStreams(Reason reason, const std::string& detail) noexcept {
  while (auto* handler = streams_.popFront()) {
    handler->data_hook_.unlink();
    handler->blocked_hook_.unlink();
    worker_.loop.guard("stream", &handler->faultable(), [&] { handler->onTunnelLost(reason, detail); });
  }
  stream_count_ = 0;
}

}  // namespace ebbtide
