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
    : worker_(worker), pod_(std::move(pod)), role_(role), fd_(std::move(fd)), pause_([this] {
        worker_.loop.modify(fd_.get(), EPOLLIN, this);
      }) {
  worker_.loop.add(fd_.get(), EPOLLIN, this);
}

Acceptor::~Acceptor() {
  worker_.loop.remove(fd_.get());
}

void Acceptor::onEvents(uint32_t) {
  for (int i = 0; i < kAcceptBatch; i++) {
    Fd accepted(accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (accepted) {
      worker_.accept(*this, std::move(accepted));
      continue;
    }
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      worker_.loop.modify(fd_.get(), 0, this);
      worker_.loop.arm(pause_, kPauseUs);
      return;
    }
    if (errno == EAGAIN) return;
    // A connection that died in the backlog: the next one.
  }
}

}  // namespace ebbtide
