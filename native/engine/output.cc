// Gathered output of a TCP connection.
#include "output.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace ebbtide {

Output::~Output() {
  for (auto& block : blocks_) pool_.give(std::move(block));
}

uint8_t* Output::reserve(size_t n) {
  if (blocks_.empty() || blocks_.back()->room() < n) blocks_.push_back(pool_.take());
  return blocks_.back()->data + blocks_.back()->end;
}

void Output::commit(size_t n) {
  blocks_.back()->end += n;
  size_ += n;
}

void Output::append(const uint8_t* data, size_t n) {
  while (n > 0) {
    uint8_t* room = reserve(1);
    size_t part = std::min(n, blocks_.back()->room());
    std::memcpy(room, data, part);
    commit(part);
    data += part;
    n -= part;
  }
}

int Output::writeTo(int fd) {
  while (size_ > 0) {
    Block& first = *blocks_.front();
    if (first.size() > 0) {
      ssize_t sent = send(fd, first.data + first.begin, first.size(), MSG_NOSIGNAL);
      if (sent < 0) {
        if (errno == EINTR) continue;
        return errno == EAGAIN ? 0 : errno;
      }
      first.begin += static_cast<size_t>(sent);
      size_ -= static_cast<size_t>(sent);
      if (first.size() > 0) return 0;
    }
    pool_.give(std::move(blocks_.front()));
    blocks_.erase(blocks_.begin());
  }
  for (auto& block : blocks_) pool_.give(std::move(block));
  blocks_.clear();
  blocks_.shrink_to_fit();
  return 0;
}

}  // namespace ebbtide
