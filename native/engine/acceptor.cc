// Accepting connections, a bounded number a turn.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>

#include "worker.h"

namespace ebbtide {
namespace {

constexpr int kAcceptBatch = 64;
// Out of descriptors or memory: the backlog waits this long.
constexpr uint64_t kPauseUs = 50'000;

}  // namespace

Acceptor::Acceptor(Worker& worker, PodPtr pod, Role role, Fd fd)
    : worker_(worker),
      pod_(std::move(pod)),
      role_(role),
      handshakes_(role == Role::kHbone ? std::make_shared<Handshakes>(worker.handshakePlaces()) : nullptr),
      fd_(std::move(fd)),
      pause_([this] { worker_.loop.add(fd_.get(), EPOLLIN, *this); }, this) {
  worker_.loop.add(fd_.get(), EPOLLIN, *this);
}

Acceptor::~Acceptor() {
  worker_.loop.remove(fd_.get(), *this);
}

void Acceptor::onFault(const char*) {
  pause();
}

void Acceptor::pause() {
  // Not only masked: a listener that is shut down reports EPOLLHUP whatever is asked.
  worker_.loop.remove(fd_.get(), *this);
  worker_.loop.arm(pause_, kPauseUs);
}

void Acceptor::onEvents(uint32_t) {
  for (int i = 0; i < kAcceptBatch; i++) {
    Fd accepted(accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (accepted) {
      worker_.accept(*this, std::move(accepted));
      continue;
    }
    int error = errno;
    if (error == EAGAIN) return;
    // Out of descriptors: a reset now tells the client more than a backlog that nobody serves.
    if ((error == EMFILE || error == ENFILE) && worker_.shed(fd_.get())) continue;
    switch (error) {
      case EMFILE:
      case ENFILE:
      case ENOBUFS:
      case ENOMEM:
      case EINVAL:  // somebody in the pod with the right to do so shut our listener down
      case EBADF:
      case ENOTSOCK:
      case EOPNOTSUPP:
        pause();
        return;
      default:
        continue;  // a connection that died in the backlog: the next one
    }
  }
}

}  // namespace ebbtide
