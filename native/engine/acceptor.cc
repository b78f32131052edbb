// Accepting connections, a bounded number a turn.
#include <linux/filter.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>

#include "worker.h"

namespace ebbtide {
namespace {

constexpr int kAcceptBatch = 64;
// Out of descriptors or memory: the backlog waits this long.
constexpr uint64_t kPauseUs = 50'000;

// Classic BPF on a TCP socket sees the segment from its TCP header on. Drops what has SYN and not ACK.
sock_filter kNoSyn[] = {
    BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 13),          BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0x12),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x02, 0, 1), BPF_STMT(BPF_RET | BPF_K, 0),
    BPF_STMT(BPF_RET | BPF_K, 0xffffffff),
};

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

void Acceptor::refuseNew() {
  sock_fprog program{sizeof kNoSyn / sizeof *kNoSyn, kNoSyn};
  // Where it fails, connections of the next moments may be reset, as they would be without it.
  refuses_ = setsockopt(fd_.get(), SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
}

void Acceptor::onEvents(uint32_t) {
  acceptSome();
}

void Acceptor::acceptRest() {
  // Nothing is added while SYNs are dropped; where they are not, it must end nevertheless.
  for (int i = 0; i <= kListenBacklog / kAcceptBatch; i++) {
    bool more = true;
    // A connection that there is no memory for leaves the others their turn.
    bool done = worker_.loop.guard("last connections", nullptr, [&] { more = acceptSome(); });
    if (done && !more) return;
  }
}

bool Acceptor::acceptSome() {
  for (int i = 0; i < kAcceptBatch; i++) {
    Fd accepted(accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (accepted) {
      int none = 0;
      if (refuses_) setsockopt(accepted.get(), SOL_SOCKET, SO_DETACH_FILTER, &none, sizeof none);
      worker_.accept(*this, std::move(accepted));
      continue;
    }
    int error = errno;
    if (error == EAGAIN) return false;
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
        return false;
      default:
        continue;  // a connection that died in the backlog: the next one
    }
  }
  return true;
}

}  // namespace ebbtide
