// Memory for bytes in flight: large blocks that a worker lends while a turn lasts, and a queue for what a
// slow application has not taken yet. Nothing here is held by an idle connection.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace ebbtide {

// Most a connection moves in one turn of the loop, in bytes. Gathering this much before one system call is
// where the throughput comes from; bounding it is what keeps other connections served.
constexpr size_t kTurnBytes = 256u << 10;
// Ciphertext received in one turn, decrypted in place and written out from there. Half of kTurnBytes moved no
// less in our measurements, and takes half the memory.
constexpr size_t kReceiveBytes = 128u << 10;
// One TLS record's plaintext.
constexpr size_t kRecordBytes = 16u << 10;

// Bytes waiting for slow applications: of the whole process, or of one pod within it, which gets a quarter.
// In three steps: pressed, windows shrink; exceeded, connections whose application does not read are cut when
// others have to wait (of the pods that hold much: who stalls does not stop others); spent, nothing more is
// taken. So five quarters of the cap is what is held at most.
class BufferBudget {
 public:
  explicit BufferBudget(uint64_t cap) : cap_(cap) {}
  explicit BufferBudget(BufferBudget& whole) : whole_(&whole), cap_(whole.cap_ / 4) {}
  void add(size_t n) {
    used_.fetch_add(n, std::memory_order_relaxed);
    if (whole_ != nullptr) whole_->add(n);
  }
  void subtract(size_t n) {
    used_.fetch_sub(n, std::memory_order_relaxed);
    if (whole_ != nullptr) whole_->subtract(n);
  }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }
  uint64_t cap() const { return cap_; }
  uint64_t bound() const { return cap_ / 4 * 5; }
  bool pressed() const { return above(2); }
  bool exceeded() const { return above(1); }
  // The process's, also when this pod has no part in it.
  bool wholeExceeded() const { return whole_ != nullptr && whole_->exceeded(); }
  // Whether `n` further bytes have no place.
  bool spent(size_t n) const { return used() + n > bound() || (whole_ != nullptr && whole_->spent(n)); }

 private:
  // Whether it holds more than a part of its cap; or the whole does, and this pod not just a little.
  bool above(uint64_t part) const {
    if (used() > cap_ / part) return true;
    return whole_ != nullptr && whole_->used() > whole_->cap_ / part && used() > cap_ / 32;
  }
  BufferBudget* const whole_ = nullptr;
  const uint64_t cap_;
  std::atomic<uint64_t> used_{0};
};

// Contiguous room for one turn's ciphertext: 256 KiB of payload, its record overhead, and control frames
// beside.
struct Block {
  static constexpr size_t kCapacity = kTurnBytes + (64u << 10);
  size_t begin = 0, end = 0;
  uint8_t data[kCapacity];

  size_t size() const { return end - begin; }
  size_t room() const { return kCapacity - end; }
};

// Free blocks of one worker.
class BlockPool {
 public:
  std::unique_ptr<Block> take();
  void give(std::unique_ptr<Block> block);
  void trim() { free_.clear(); }

 private:
  static constexpr size_t kKeep = 4;
  std::vector<std::unique_ptr<Block>> free_;
};

// First in, first out, in chunks; memory is taken only while bytes wait.
class ByteQueue {
 public:
  explicit ByteQueue(BufferBudget& budget) : budget_(budget) {}
  ~ByteQueue() { clear(); }
  ByteQueue(const ByteQueue&) = delete;
  ByteQueue& operator=(const ByteQueue&) = delete;

  void append(const void* data, size_t n);
  // Whether there is room for `n` more bytes in the budget.
  bool takes(size_t n) const;
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  // Fills at most `max` vectors with what is at the front; returns how many.
  int peek(iovec* vectors, int max) const;
  void consume(size_t n);
  void clear();

 private:
  struct Chunk;
  BufferBudget& budget_;
  Chunk* head_ = nullptr;
  Chunk* tail_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ebbtide
