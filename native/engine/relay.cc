// Relays between sockets and streams.
#include "relay.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "worker.h"

namespace ebbtide {
namespace {

constexpr const char* kOverflow = "the application does not read, and its pod's share of buffers is used up";

}  // namespace

StreamRelay::~StreamRelay() {
  if (tunnel_ != nullptr) tunnel_->reset(*this, NGHTTP2_CANCEL);
  if (slices_) worker_.giveSlices(std::move(slices_));
}

void StreamRelay::start() {
  started_ = true;
  application_.setUser(*this);
  application_.wantRead(true);
  int error = 0;
  if (application_.waiting() > 0 && !application_.drain(error)) {
    onBroken(application_, error);
    return;
  }
  if (stream_ended_) application_.finish();
  endIfDone();
}

void StreamRelay::abandon(uint32_t code) {
  ended_ = true;
  if (tunnel_ == nullptr) return;
  Tunnel* tunnel = tunnel_;
  tunnel_ = nullptr;
  tunnel->reset(*this, code);
}

void StreamRelay::cut(uint32_t code) {
  abandon(code);
  application_.close(true);
}

void StreamRelay::letGo() {
  ended_ = true;
  if (tunnel_ == nullptr) return;
  Tunnel* tunnel = tunnel_;
  tunnel_ = nullptr;
  tunnel->detach(*this);
}

void StreamRelay::onData(const uint8_t* data, size_t n) {
  if (ended_) return;
  if (!started_ || application_.waiting() > 0) {
    if (!application_.enqueue(data, n)) onBroken(application_, ENOBUFS);
    return;
  }
  if (!slices_) slices_ = worker_.takeSlices();
  slices_->push_back({const_cast<uint8_t*>(data), n});
}

void StreamRelay::onTurnData() {
  if (!slices_) return;
  auto slices = std::move(slices_);
  for (size_t i = 0; i < slices->size() && !ended_; i += 1024) {
    size_t taken = 0;
    int error = 0;
    int count = static_cast<int>(std::min<size_t>(1024, slices->size() - i));
    bool last = stream_ended_ && i + 1024 >= slices->size();
    if (!application_.write(slices->data() + i, count, taken, error, last)) {
      onBroken(application_, error);
      break;
    }
    if (taken > 0) {
      owner_.toApplication(taken);
      if (tunnel_ != nullptr) tunnel_->delivered(*this, taken);
    }
  }
  worker_.giveSlices(std::move(slices));
  if (!ended_ && stream_ended_ && !closing()) {
    application_.finish();
    endIfDone();
  }
}

void StreamRelay::onEnd() {
  stream_ended_ = true;
  // After the data that came with it; or by onClosed(), which follows at once.
  if (!started_ || slices_ || closing()) return;
  application_.finish();
  endIfDone();
}

void StreamRelay::onClosed(uint32_t code) {
  tunnel_ = nullptr;
  if (ended_) return;
  if (!started_) {
    ended_ = true;
    owner_.onStreamRefused(code);
    return;
  }
  // CANCEL after END_STREAM: the peer said all it had to say and wants no answer, as ztunnel does when its
  // application is gone. What it said is still delivered. Without END_STREAM it is a truncation, which
  // ztunnel takes for an end.
  if (code != NGHTTP2_NO_ERROR && !(code == NGHTTP2_CANCEL && stream_ended_)) {
    end(Reason::kApplicationReset, std::string("RST_STREAM ") + nghttp2_http2_strerror(code));
    return;
  }
  // Both ends ended it, or a peer that ends streams by RST_STREAM(NO_ERROR): the rest is delivered, then
  // closed.
  stream_ended_ = true;
  application_ended_ = true;
  if (application_.waiting() > 0) {
    application_.wantRead(false);
    application_.finish();
    return;
  }
  ended_ = true;
  application_.close(false);  // FIN, without a shutdown() of its own
  owner_.onRelayEnded(Reason::kNone, "");
}

void StreamRelay::onTunnelLost(Reason reason, const std::string& detail) {
  tunnel_ = nullptr;
  if (ended_) return;
  if (!started_) {
    ended_ = true;
    owner_.onStreamTunnelLost(reason, detail);
    return;
  }
  if (stream_ended_ && application_ended_) {
    endIfDone();
    return;  // nothing more is expected of the tunnel
  }
  end(reason, detail);
}

void StreamRelay::onWritable() {
  if (!ended_ && !application_ended_) application_.wantRead(true);
}

void StreamRelay::onReadable(SocketEnd&) {
  if (tunnel_ == nullptr) return;
  size_t room = tunnel_->sendable(*this);
  if (room == 0) {
    application_.wantRead(false);
    tunnel_->waitWritable(*this);
    return;
  }
  uint8_t* buffer = worker_.application_buffer.get() + Tunnel::kHeadroom;
  int error = 0;
  ssize_t n = application_.read(buffer, room, error);
  if (n == -1) return;
  if (n == -2) {
    onBroken(application_, error);
    return;
  }
  if (n == 0) {
    application_ended_ = true;
    application_.wantRead(false);
    tunnel_->sendEnd(*this);
    return;
  }
  owner_.fromApplication(static_cast<size_t>(n));
  tunnel_->send(*this, buffer, static_cast<size_t>(n));
}

void StreamRelay::onDelivered(SocketEnd&, size_t n) {
  owner_.toApplication(n);
  if (tunnel_ != nullptr) tunnel_->delivered(*this, n);
  endIfDone();
}

void StreamRelay::onBroken(SocketEnd&, int error) {
  if (error == ENOBUFS) {
    overflow();
  } else {
    end(Reason::kApplicationReset, std::strerror(error));
  }
}

void StreamRelay::overflow() {
  if (started_) {
    end(Reason::kBuffersFull, kOverflow);
  } else if (!ended_) {
    cut(NGHTTP2_ENHANCE_YOUR_CALM);
    owner_.onRelayEnded(Reason::kBuffersFull, kOverflow);
  }
}

void StreamRelay::endIfDone() {
  if (ended_ || !started_ || tunnel_ != nullptr || slices_ || !application_.finished()) return;
  ended_ = true;
  application_.close(false);
  owner_.onRelayEnded(Reason::kNone, "");
}

void StreamRelay::end(Reason reason, const std::string& detail) {
  if (ended_) return;
  cut(NGHTTP2_CONNECT_ERROR);
  owner_.onRelayEnded(reason, detail);
}

void SocketRelay::start() {
  for (SocketEnd* end : {&application_, &other_}) {
    end->setUser(*this);
    end->wantRead(true);
  }
  for (SocketEnd* end : {&application_, &other_}) {
    int error = 0;
    if (!ended_ && end->waiting() > 0 && !end->drain(error)) onBroken(*end, error);
  }
}

void SocketRelay::onReadable(SocketEnd& end) {
  SocketEnd& target = opposite(end);
  int error = 0;
  uint8_t* buffer = worker_.application_buffer.get();
  // Nothing tells an application how much may wait for the other end, so less is read while much does.
  ssize_t n = end.read(buffer, end.pressed() ? kRecordBytes : kTurnBytes, error);
  if (n == -1) return;
  if (n == -2) {
    onBroken(end, error);
    return;
  }
  if (n == 0) {
    end.wantRead(false);
    target.finish();
    endIfDone();
    return;
  }
  if (&end == &application_) owner_.fromApplication(static_cast<size_t>(n));
  iovec whole{buffer, static_cast<size_t>(n)};
  size_t taken = 0;
  if (!target.write(&whole, 1, taken, error)) {
    onBroken(target, error);
    return;
  }
  if (&target == &application_ && taken > 0) owner_.toApplication(taken);
  if (target.waiting() > 0) end.wantRead(false);
}

void SocketRelay::onDelivered(SocketEnd& end, size_t n) {
  if (&end == &application_) owner_.toApplication(n);
  SocketEnd& source = opposite(end);
  if (end.waiting() == 0 && !end.finished()) source.wantRead(true);
  endIfDone();
}

void SocketRelay::onBroken(SocketEnd&, int error) {
  if (ended_) return;
  ended_ = true;
  application_.close(true);
  other_.close(true);
  if (error == ENOBUFS) {
    owner_.onRelayEnded(Reason::kBuffersFull, kOverflow);
  } else {
    owner_.onRelayEnded(Reason::kApplicationReset, std::strerror(error));
  }
}

void SocketRelay::endIfDone() {
  if (ended_ || !application_.finished() || !other_.finished()) return;
  ended_ = true;
  application_.close(false);
  other_.close(false);
  owner_.onRelayEnded(Reason::kNone, "");
}

}  // namespace ebbtide
