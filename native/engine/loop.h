// One thread's event loop: epoll, timers, a mailbox for other threads, and objects that wait for the end of
// the turn to be destroyed. Everything but post() belongs to the thread that calls turn().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "socket.h"

namespace ebbtide {

// Whatever is destroyed at the end of a turn, so that events of the same turn never meet freed memory.
class Disposable {
 public:
  virtual ~Disposable() = default;
};

class Pollable {
 public:
  // `events` are EPOLL* bits. May be called after the object closed its descriptor in the same turn: check.
  virtual void onEvents(uint32_t events) = 0;
  // onEvents() threw, for want of memory: end this connection, hard.
  virtual void onFault() {}

 protected:
  ~Pollable() = default;
};

class Loop;

// A one-shot timer; destroying it cancels it.
class Timer {
 public:
  explicit Timer(std::function<void()> fire) : fire_(std::move(fire)) {}
  ~Timer() { cancel(); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  bool armed() const { return loop_ != nullptr; }
  void cancel();

 private:
  friend class Loop;
  std::function<void()> fire_;
  Loop* loop_ = nullptr;
  uint64_t deadline_us_ = 0;
  size_t slot_ = 0;
};

class Loop {
 public:
  Loop();  // throws std::runtime_error
  ~Loop();

  // One turn: waits for events or the next timer, and calls them all. `max_wait_ms` < 0: no bound.
  void turn(int max_wait_ms);

  void add(int fd, uint32_t events, Pollable* target);
  void modify(int fd, uint32_t events, Pollable* target);
  void remove(int fd);

  // Replaces an earlier deadline of the same timer.
  void arm(Timer& timer, uint64_t delay_us);
  void dispose(std::unique_ptr<Disposable> object) { disposed_.push_back(std::move(object)); }
  void destroyDisposed();

  // Any thread. Runs `task` in the loop's thread; false (and never) once closeMailbox() was called.
  bool post(std::function<void()> task);
  void closeMailbox();

  uint64_t nowUs() const { return now_us_; }  // monotonic, as of this turn

 private:
  friend class Timer;
  void fireTimers();
  void runMailbox();
  void siftUp(size_t slot);
  void siftDown(size_t slot);
  void erase(Timer& timer);

  Fd epoll_, wake_;
  uint64_t now_us_ = 0;
  std::vector<Timer*> heap_;
  std::vector<std::unique_ptr<Disposable>> disposed_;
  std::mutex mutex_;  // guards the two below
  std::vector<std::function<void()>> mailbox_;
  bool mailbox_closed_ = false;
};

// Monotonic microseconds.
uint64_t monotonicUs();

}  // namespace ebbtide
