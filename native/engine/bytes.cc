// Blocks and byte queues.
#include "bytes.h"

#include <algorithm>
#include <cstring>

namespace ebbtide {

std::unique_ptr<Block> BlockPool::take() {
  if (free_.empty()) return std::unique_ptr<Block>(new Block);  // not make_unique: that would clear 320 KiB
  auto block = std::move(free_.back());
  free_.pop_back();
  block->begin = block->end = 0;
  return block;
}

void BlockPool::give(std::unique_ptr<Block> block) {
  if (free_.size() < kKeep) free_.push_back(std::move(block));
}

struct ByteQueue::Chunk {
  static constexpr size_t kCapacity = (32u << 10) - 16;
  Chunk* next = nullptr;
  uint32_t begin = 0, end = 0;
  uint8_t data[kCapacity];
};

void ByteQueue::append(const void* data, size_t n) {
  auto* bytes = static_cast<const uint8_t*>(data);
  while (n > 0) {
    if (tail_ == nullptr || tail_->end == Chunk::kCapacity) {
      auto* chunk = new Chunk;
      budget_.add(sizeof(Chunk));
      (tail_ == nullptr ? head_ : tail_->next) = chunk;
      tail_ = chunk;
    }
    size_t part = std::min<size_t>(n, Chunk::kCapacity - tail_->end);
    std::memcpy(tail_->data + tail_->end, bytes, part);
    tail_->end += static_cast<uint32_t>(part);
    size_ += part;
    bytes += part;
    n -= part;
  }
}

bool ByteQueue::takes(size_t n) const {
  size_t room = tail_ == nullptr ? 0 : Chunk::kCapacity - tail_->end;
  if (n <= room) return true;
  return !budget_.spent((n - room + Chunk::kCapacity - 1) / Chunk::kCapacity * sizeof(Chunk));
}

int ByteQueue::peek(iovec* vectors, int max) const {
  int count = 0;
  for (Chunk* chunk = head_; chunk != nullptr && count < max; chunk = chunk->next) {
    vectors[count++] = {chunk->data + chunk->begin, chunk->end - chunk->begin};
  }
  return count;
}

void ByteQueue::consume(size_t n) {
  size_ -= n;
  while (head_ != nullptr && (n > 0 || head_->begin == head_->end)) {
    size_t part = std::min<size_t>(n, head_->end - head_->begin);
    head_->begin += static_cast<uint32_t>(part);
    n -= part;
    if (head_->begin < head_->end) return;
    Chunk* next = head_->next;
    delete head_;
    budget_.subtract(sizeof(Chunk));
    head_ = next;
    if (head_ == nullptr) tail_ = nullptr;
  }
}

void ByteQueue::clear() {
  consume(size_);
}

}  // namespace ebbtide
