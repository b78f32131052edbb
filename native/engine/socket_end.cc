// A TCP connection to an application.
#include "socket_end.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>

#include "worker.h"

namespace ebbtide {

SocketEnd::SocketEnd(Worker& worker, User& user, BufferBudget& budget)
    : worker_(worker), user_(&user), budget_(budget), waiting_(budget), waiting_hook_(this) {}

SocketEnd::~SocketEnd() {
  close(true);
}

void SocketEnd::adopt(Fd fd, bool connecting) {
  fd_ = std::move(fd);
  connecting_ = connecting;
  mask_ = connecting ? static_cast<uint32_t>(EPOLLOUT) : 0u;
  worker_.loop.add(fd_.get(), mask_, *this);
}

void SocketEnd::adoptConnected(Fd fd) {
  fd_ = std::move(fd);
  detached_ = true;
}

void SocketEnd::wantRead(bool want) {
  if (read_wanted_ == want) return;
  read_wanted_ = want;
  update();
}

void SocketEnd::update() {
  if (!fd_ || connecting_) return;
  uint32_t mask = (read_wanted_ ? static_cast<uint32_t>(EPOLLIN | EPOLLRDHUP) : 0u) |
                  (waiting_.empty() ? 0u : static_cast<uint32_t>(EPOLLOUT));
  if (detached_) {
    if (mask == 0) return;
    detached_ = false;
    mask_ = mask;
    worker_.loop.add(fd_.get(), mask, *this);
    return;
  }
  if (mask == mask_) return;
  mask_ = mask;
  worker_.loop.modify(fd_.get(), mask, *this);
}

ssize_t SocketEnd::read(uint8_t* out, size_t capacity, int& error) {
  ssize_t n = recv(fd_.get(), out, capacity, 0);
  if (n >= 0) return n;
  if (errno == EAGAIN || errno == EINTR) return -1;
  error = errno;
  return -2;
}

bool SocketEnd::write(iovec* vectors, int count, size_t& taken, int& error, bool last) {
  taken = 0;
  int next = 0;
  if (waiting_.empty() && fd_) {
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = static_cast<size_t>(count);
    ssize_t n = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | (last ? MSG_MORE : 0));
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
      error = errno;
      return false;
    }
    size_t left = n < 0 ? 0 : static_cast<size_t>(n);
    taken = left;
    for (; next < count && left >= vectors[next].iov_len; next++) left -= vectors[next].iov_len;
    if (next < count) {
      vectors[next].iov_base = static_cast<uint8_t*>(vectors[next].iov_base) + left;
      vectors[next].iov_len -= left;
    }
  }
  for (; next < count; next++) {
    if (enqueue(vectors[next].iov_base, vectors[next].iov_len)) continue;
    error = ENOBUFS;
    return false;
  }
  update();
  return true;
}

bool SocketEnd::enqueue(const void* data, size_t n) {
  if (budget_.exceeded() || budget_.wholeExceeded()) worker_.relieve(*this);
  if (!fd_ || !waiting_.takes(n)) return false;
  if (waiting_.empty()) progressed();
  waiting_.append(data, n);
  return true;
}

void SocketEnd::progressed() {
  progress_us_ = worker_.loop.nowUs();
  worker_.waiting_ends.pushBack(waiting_hook_);
}

bool SocketEnd::writeFirst(const void* data, size_t n) {
  return send(fd_.get(), data, n, MSG_NOSIGNAL) == static_cast<ssize_t>(n);
}

bool SocketEnd::drain(int& error) {
  size_t total = 0;
  while (!waiting_.empty() && total < kTurnBytes) {
    iovec vectors[8];
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = static_cast<size_t>(waiting_.peek(vectors, 8));
    ssize_t n = sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EAGAIN || errno == EINTR) break;
      error = errno;
      return false;
    }
    waiting_.consume(static_cast<size_t>(n));
    total += static_cast<size_t>(n);
  }
  update();
  if (waiting_.empty()) {
    waiting_hook_.unlink();
  } else if (total > 0) {
    progressed();
  }
  if (waiting_.empty() && finish_wanted_) finish();
  if (total > 0) user_->onDelivered(*this, total);
  return true;
}

void SocketEnd::finish() {
  finish_wanted_ = true;
  if (!waiting_.empty() || shut_ || !fd_) return;
  shut_ = true;
  shutdown(fd_.get(), SHUT_WR);
}

void SocketEnd::close(bool reset) {
  if (!fd_) return;
  if (reset) resetOnClose(fd_.get());
  if (!detached_) worker_.loop.remove(fd_.get(), *this);
  fd_.reset();
  waiting_.clear();
  waiting_hook_.unlink();
}

void SocketEnd::onEvents(uint32_t events) {
  if (!fd_) return;
  if (connecting_) {
    int error = takeSocketError(fd_.get());
    connecting_ = false;
    if (error == 0) update();
    user_->onConnected(*this, error);
    return;
  }
  if (events & EPOLLERR) {
    int error = takeSocketError(fd_.get());
    user_->onBroken(*this, error != 0 ? error : ECONNRESET);
    return;
  }
  if ((events & EPOLLOUT) && !waiting_.empty()) {
    int error = 0;
    if (!drain(error)) {
      user_->onBroken(*this, error);
      return;
    }
    if (!fd_) return;
  }
  if (!(events & (EPOLLIN | EPOLLHUP))) return;
  if (read_wanted_) {
    user_->onReadable(*this);
    // The end is right behind the data: it goes on together with it.
    if ((events & EPOLLRDHUP) && fd_ && read_wanted_) user_->onReadable(*this);
  } else if (events & EPOLLHUP) {
    // Closed both ways while nobody may read yet: epoll would report it without end.
    worker_.loop.remove(fd_.get(), *this);
    detached_ = true;
  }
}

}  // namespace ebbtide
