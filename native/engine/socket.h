// TCP sockets as the mesh needs them: owned descriptors, addresses, options, listeners inside a pod, dialling
// with a client's address, and the thread's network namespace.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "model.h"

namespace ebbtide {

constexpr uint16_t kOutboundPort = 15001;
constexpr uint16_t kPlaintextPort = 15006;
constexpr uint16_t kHbonePort = 15008;

inline bool isMeshPort(uint16_t port) {
  return port == kOutboundPort || port == kPlaintextPort || port == kHbonePort;
}

// An owned file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Fd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

SocketAddress fromSockaddr(const sockaddr_storage& storage);
// Writes the address as IPv4 or IPv6 (never mapped); returns the length.
socklen_t toSockaddr(const SocketAddress& address, sockaddr_storage& out);

std::optional<SocketAddress> localAddress(int fd);
std::optional<SocketAddress> peerAddress(int fd);
// What the application dialled: SO_ORIGINAL_DST (conntrack's, or the capture program's answer), else the
// local address.
std::optional<SocketAddress> originalDestination(int fd);

// Keepalive after 180 s, every 180 s, 9 probes. Accepted sockets inherit it from their listener; what is
// dialled within the pod needs none, since both ends are of one kernel; tunnels have PING.
void keepAlive(int fd);
// The close that follows sends RST.
void resetOnClose(int fd);
int takeSocketError(int fd);

// Connections that a listener holds until they are accepted.
constexpr int kListenBacklog = 4096;

// A listener of a pod. Call in a thread that is in the pod's network namespace. Throws std::runtime_error.
// `reuse_port`: several workers share a fixed port (no capture program that rewrites it).
struct Listener {
  Fd fd;
  bool kept_port;  // the kernel program did not rewrite the port
};
Listener openListener(uint16_t port, bool reuse_port);

// A non-blocking connect in the calling thread's network namespace. `claim`: the client to be shown to the
// application. `claim_port`: bind to the client's port too (the capture program takes it as a claim);
// otherwise the kernel chooses one.
struct DialResult {
  Fd fd;
  int error = 0;  // errno; 0: connected or in progress
};
DialResult dial(const SocketAddress& to, const std::optional<SocketAddress>& claim, bool claim_port);
// How a connect() in progress stands: 0 once connected, EALREADY while it goes on, or the errno it failed
// with.
int connectProgress(int fd, const SocketAddress& to);

// The calling thread's network namespace.
class ThreadNamespace {
 public:
  ThreadNamespace();  // remembers the present one as home
  // errno, 0 when the thread is in the namespace of `fd`. `key` tells namespaces apart: repeated calls cost
  // nothing.
  int enter(const void* key, int fd);
  // Goes home when in the namespace of `key`.
  void leave(const void* key);

 private:
  Fd home_;
  const void* current_ = nullptr;
};

}  // namespace ebbtide
