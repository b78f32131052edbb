// System calls on SOCK_SEQPACKET unix sockets and process descriptors; no JavaScript in here.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ebbtide::seqpacket {

// Messages of ZDS are at most this long in both directions.
inline constexpr std::size_t kMaxMessage = 1024;
// Descriptors taken from one message; ZDS allows one. More are closed by the kernel, which sets MSG_CTRUNC.
inline constexpr std::size_t kMaxFds = 4;

// What a call came to: an errno value, or 0 with the result.
template <typename T>
struct Result {
  int error = 0;
  T value{};
};

struct Peer {
  pid_t pid = 0;
  uid_t uid = 0;
  gid_t gid = 0;
};

struct Message {
  std::array<std::uint8_t, kMaxMessage> data;
  std::size_t size = 0;
  std::array<int, kMaxFds> fds;
  std::size_t fd_count = 0;
  // MSG_TRUNC or MSG_CTRUNC.
  bool truncated = false;

  // Closes the descriptors that nobody took over.
  void close_fds();
};

// A listening socket at `path`, its file created with `mode`. The file must not exist.
Result<int> listen_at(const std::string& path, mode_t mode, int backlog);

// A connected socket; does not wait (EAGAIN: the listener's backlog is full).
Result<int> connect_to(const std::string& path);

// The next waiting connection, or EAGAIN.
Result<int> accept_from(int listener);

// Sends one whole message, with a descriptor unless `fd` is -1. 0, or errno (EAGAIN: the socket's buffer is
// full).
int send_message(int socket, const std::uint8_t* data, std::size_t size, int fd);

// Takes one message. 0, or errno (EAGAIN: none there). At the end of the stream, and for a message without a
// byte, which cannot be told from it, `size` is 0.
int receive_message(int socket, Message* message);

// Who was on the other side when the connection was made.
Result<Peer> peer_of(int socket);

// A descriptor that becomes readable when the peer process ends. From the socket itself where the kernel can
// (SO_PEERPIDFD, 6.5), which rules out that the process id was used again; else opened from the id.
// ESRCH: the process has ended.
Result<int> peer_pidfd(int socket, pid_t pid);

// Whether the process of the descriptor has not ended, so that its process id is still its own.
bool is_running(int pidfd);

}  // namespace ebbtide::seqpacket
