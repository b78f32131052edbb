// Ciphertext on its way to one TCP connection: gathered in borrowed blocks, handed to the kernel in few large
// calls.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bytes.h"

namespace ebbtide {

class Output {
 public:
  explicit Output(BlockPool& pool) : pool_(pool) {}
  ~Output();
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  void append(const uint8_t* data, size_t n);
  // Contiguous room for at least `n` (<= Block::kCapacity) bytes; then commit what was used.
  uint8_t* reserve(size_t n);
  void commit(size_t n);
  size_t size() const { return size_; }
  // Writes what the kernel takes. Returns 0 or an errno that ended the connection; EAGAIN is no error.
  int writeTo(int fd);

 private:
  BlockPool& pool_;
  std::vector<std::unique_ptr<Block>> blocks_;  // all but the last are closed
  size_t size_ = 0;
};

}  // namespace ebbtide
