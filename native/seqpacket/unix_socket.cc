#include "unix_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

// Newer than the C library's headers.
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace ebbtide::seqpacket {
namespace {

int fill(const std::string& path, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  // An empty path or a leading NUL would be the abstract namespace, which has no file permissions.
  if (path.empty() || path.find('\0') != std::string::npos) return EINVAL;
  if (path.size() >= sizeof(address->sun_path)) return ENAMETOOLONG;
  std::memcpy(address->sun_path, path.data(), path.size());
  return 0;
}

Result<int> failed(int socket) {
  const int error = errno;
  close(socket);
  return {error, -1};
}

int open_socket() {
  return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

}  // namespace

void Message::close_fds() {
  for (std::size_t i = 0; i < fd_count; i++) close(fds[i]);
  fd_count = 0;
}

Result<int> listen_at(const std::string& path, mode_t mode, int backlog) {
  sockaddr_un address;
  if (const int error = fill(path, &address); error != 0) return {error, -1};
  const int listener = open_socket();
  if (listener < 0) return {errno, -1};
  // Before bind, which makes the file with the socket's mode: there is no moment with a wider one.
  if (fchmod(listener, mode) != 0) return failed(listener);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return failed(listener);
  if (listen(listener, backlog) != 0) {
    const int error = errno;
    unlink(path.c_str());
    close(listener);
    return {error, -1};
  }
  return {0, listener};
}

Result<int> connect_to(const std::string& path) {
  sockaddr_un address;
  if (const int error = fill(path, &address); error != 0) return {error, -1};
  const int connection = open_socket();
  if (connection < 0) return {errno, -1};
  if (connect(connection, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0)
    return failed(connection);
  return {0, connection};
}

Result<int> accept_from(int listener) {
  int connection;
  do {
    connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  } while (connection < 0 && (errno == EINTR || errno == ECONNABORTED));
  if (connection < 0) return {errno, -1};
  return {0, connection};
}

int send_message(int socket, const std::uint8_t* data, std::size_t size, int fd) {
  iovec part{const_cast<std::uint8_t*>(data), size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    cmsghdr* entry = CMSG_FIRSTHDR(&header);
    entry->cmsg_level = SOL_SOCKET;
    entry->cmsg_type = SCM_RIGHTS;
    entry->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(entry), &fd, sizeof(int));
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? errno : 0;
}

int receive_message(int socket, Message* message) {
  iovec part{message->data.data(), message->data.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)];
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  ssize_t got;
  do {
    got = recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (got < 0 && errno == EINTR);
  message->fd_count = 0;
  if (got < 0) return errno;
  message->size = static_cast<std::size_t>(got);
  message->truncated = (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  for (cmsghdr* entry = CMSG_FIRSTHDR(&header); entry != nullptr; entry = CMSG_NXTHDR(&header, entry)) {
    if (entry->cmsg_level != SOL_SOCKET || entry->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (entry->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(entry) + i * sizeof(int), sizeof(int));
      if (message->fd_count < kMaxFds) {
        message->fds[message->fd_count++] = fd;
      } else {
        // Padding of the control buffer can hold one more than asked for.
        close(fd);
        message->truncated = true;
      }
    }
  }
  return 0;
}

Result<Peer> peer_of(int socket) {
  ucred credentials = {};
  socklen_t size = sizeof(credentials);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return {errno, {}};
  return {0, {credentials.pid, credentials.uid, credentials.gid}};
}

Result<int> peer_pidfd(int socket, pid_t pid) {
  int fd = -1;
  socklen_t size = sizeof(fd);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0) return {0, fd};
  // Kernels answer ESRCH or EINVAL for a process that was reaped; ENOPROTOOPT: older than 6.5.
  if (errno != ENOPROTOOPT) return {errno == EINVAL ? ESRCH : errno, -1};
  if (pid <= 0) return {ESRCH, -1};
  fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  return fd < 0 ? Result<int>{errno, -1} : Result<int>{0, fd};
}

bool is_running(int pidfd) {
  pollfd process{pidfd, POLLIN, 0};
  int ready;
  do {
    ready = poll(&process, 1, 0);
  } while (ready < 0 && errno == EINTR);
  return ready == 0;
}

}  // namespace ebbtide::seqpacket
