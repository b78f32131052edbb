// What a drain's end is told to.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace ebbtide::test {

// Told when a drain ends; counts how often.
class Drained {
 public:
  std::function<void()> callback() {
    return [this] {
      std::lock_guard lock(mutex_);
      times_++;
      changed_.notify_all();
    };
  }
  bool within(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return times_ > 0; });
  }
  int times() {
    std::lock_guard lock(mutex_);
    return times_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int times_ = 0;
};

}  // namespace ebbtide::test
