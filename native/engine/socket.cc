// TCP sockets as the mesh needs them.
#include "socket.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace ebbtide {
namespace {

constexpr int kOriginalDestination = 80;  // SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
constexpr int kMark = 1337;               // "sent by the mesh", as istio-cni's rules know it

// Best effort everywhere it is used: each option improves a connection, none is needed for its safety.
bool setInt(int fd, int level, int option, int value) {
  return setsockopt(fd, level, option, &value, sizeof value) == 0;
}

}  // namespace

void Fd::reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

SocketAddress fromSockaddr(const sockaddr_storage& storage) {
  if (storage.ss_family == AF_INET6) {
    auto& in6 = reinterpret_cast<const sockaddr_in6&>(storage);
    return {IpAddress::fromV6(&in6.sin6_addr), ntohs(in6.sin6_port)};
  }
  auto& in = reinterpret_cast<const sockaddr_in&>(storage);
  return {IpAddress::fromV4(&in.sin_addr), ntohs(in.sin_port)};
}

socklen_t toSockaddr(const SocketAddress& address, sockaddr_storage& out) {
  std::memset(&out, 0, sizeof out);
  if (address.ip.v4) {
    auto& in = reinterpret_cast<sockaddr_in&>(out);
    in.sin_family = AF_INET;
    in.sin_port = htons(address.port);
    std::memcpy(&in.sin_addr, address.ip.bytes.data(), 4);
    return sizeof in;
  }
  auto& in6 = reinterpret_cast<sockaddr_in6&>(out);
  in6.sin6_family = AF_INET6;
  in6.sin6_port = htons(address.port);
  std::memcpy(&in6.sin6_addr, address.ip.bytes.data(), 16);
  return sizeof in6;
}

std::optional<SocketAddress> localAddress(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &length) != 0) return std::nullopt;
  return fromSockaddr(storage);
}

std::optional<SocketAddress> peerAddress(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&storage), &length) != 0) return std::nullopt;
  return fromSockaddr(storage);
}

std::optional<SocketAddress> originalDestination(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof(sockaddr_in);
  if (getsockopt(fd, SOL_IP, kOriginalDestination, &storage, &length) == 0 && storage.ss_family == AF_INET) {
    return fromSockaddr(storage);
  }
  length = sizeof(sockaddr_in6);
  if (getsockopt(fd, SOL_IPV6, kOriginalDestination, &storage, &length) == 0 &&
      storage.ss_family == AF_INET6) {
    return fromSockaddr(storage);
  }
  return localAddress(fd);
}

void keepAlive(int fd) {
  setInt(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  setInt(fd, IPPROTO_TCP, TCP_KEEPIDLE, 180);
  setInt(fd, IPPROTO_TCP, TCP_KEEPINTVL, 180);
  setInt(fd, IPPROTO_TCP, TCP_KEEPCNT, 9);
}

void resetOnClose(int fd) {
  linger hard{1, 0};
  (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
}

int takeSocketError(int fd) {
  int error = 0;
  socklen_t length = sizeof error;
  return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

Listener openListener(uint16_t port, bool reuse_port) {
  auto fail = [port](const char* what) {
    return std::runtime_error(std::string(what) + " for port " + std::to_string(port) + ": " +
                              std::strerror(errno));
  };
  sockaddr_storage any{};
  socklen_t any_length = sizeof(sockaddr_in6);
  Fd fd(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (fd) {
    setInt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
    auto& in6 = reinterpret_cast<sockaddr_in6&>(any);
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons(port);
  } else {
    fd = Fd(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd) throw fail("cannot create a listening socket");
    auto& in = reinterpret_cast<sockaddr_in&>(any);
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    any_length = sizeof in;
  }
  setInt(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (reuse_port) setInt(fd.get(), SOL_SOCKET, SO_REUSEPORT, 1);
  setInt(fd.get(), SOL_SOCKET, SO_MARK, kMark);
  setInt(fd.get(), SOL_IP, IP_TRANSPARENT, 1);
  setInt(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);  // for the accepted, as keepalive
  keepAlive(fd.get());
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&any), any_length) != 0) {
    if (errno == EADDRINUSE && !reuse_port) return {Fd(), true};  // another proxy of this kind listens: share
    throw fail("cannot bind");
  }
  auto bound = localAddress(fd.get());
  bool kept = bound && bound->port == port;
  if (kept && !reuse_port) return {Fd(), true};
  if (listen(fd.get(), kListenBacklog) != 0) throw fail("cannot listen");
  return {std::move(fd), kept};
}

DialResult dial(const SocketAddress& to, const std::optional<SocketAddress>& claim, bool claim_port) {
  Fd fd(socket(to.ip.v4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return {Fd(), errno};
  setInt(fd.get(), SOL_SOCKET, SO_MARK, kMark);
  setInt(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  sockaddr_storage address{};
  if (claim && claim->ip.v4 == to.ip.v4 && claim->ip != to.ip && !claim->ip.isLoopback()) {
    // Either lets a foreign address be bound; the first needs a capability.
    if (to.ip.v4) {
      if (!setInt(fd.get(), SOL_IP, IP_TRANSPARENT, 1)) setInt(fd.get(), SOL_IP, IP_FREEBIND, 1);
    } else {
      if (!setInt(fd.get(), SOL_IPV6, IPV6_TRANSPARENT, 1)) setInt(fd.get(), SOL_IPV6, IPV6_FREEBIND, 1);
    }
    setInt(fd.get(), SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    SocketAddress source = *claim;
    if (!claim_port) source.port = 0;
    socklen_t length = toSockaddr(source, address);
    // Without the right to be transparent the application sees the pod's own address: reachable, if less
    // informed.
    (void)bind(fd.get(), reinterpret_cast<sockaddr*>(&address), length);
  }
  socklen_t length = toSockaddr(to, address);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 && errno != EINPROGRESS) {
    return {Fd(), errno};
  }
  return {std::move(fd), 0};
}

int connectProgress(int fd, const SocketAddress& to) {
  sockaddr_storage address{};
  socklen_t length = toSockaddr(to, address);
  // The kernel takes a further call on a connecting socket as the question how it went.
  return connect(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 ? 0 : errno;
}

ThreadNamespace::ThreadNamespace() : home_(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC)) {}

int ThreadNamespace::enter(const void* key, int fd) {
  if (key == current_) return 0;
  if (setns(fd, CLONE_NEWNET) != 0) return errno;
  current_ = key;
  return 0;
}

void ThreadNamespace::leave(const void* key) {
  if (key != current_ || current_ == nullptr) return;
  // Going home cannot fail for a thread that could leave it; were it to, the next enter() moves the thread
  // on.
  (void)!setns(home_.get(), CLONE_NEWNET);
  current_ = nullptr;
}

}  // namespace ebbtide
