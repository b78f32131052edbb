// One thread's event loop: epoll, timers, a mailbox for other threads, and objects that wait for the end of
// the turn to be destroyed. Everything but post() belongs to the thread that calls turn().
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "list.h"
#include "socket.h"

namespace ebbtide {

// Whatever is destroyed at the end of a turn, so that events of the same turn never meet freed memory.
class Disposable {
 public:
  virtual ~Disposable() = default;

 private:
  friend class Loop;
  Disposable* next_disposed_ = nullptr;
};

// What an exception ends instead of the process: one connection, one listener.
class Faultable {
 public:
  // Something of it threw (for want of memory, mostly), or the kernel does not watch its descriptor: end it,
  // hard. `what` says the error. When this throws it is called again with the next turn.
  virtual void onFault(const char* what) = 0;

 protected:
  Faultable() : fault_hook_(this) {}
  ~Faultable() = default;

 private:
  friend class Loop;
  ListHook<Faultable> fault_hook_;
  int watch_error_ = 0;
};

class Pollable : public Faultable {
 public:
  // `events` are EPOLL* bits. May be called after the object closed its descriptor in the same turn: check.
  virtual void onEvents(uint32_t events) = 0;

 protected:
  ~Pollable() = default;
};

class Loop;

// A one-shot timer; destroying it cancels it.
class Timer {
 public:
  // `owner`: whom an exception of `fire` ends. Without one, `fire` is called again a little later.
  explicit Timer(std::function<void()> fire, Faultable* owner = nullptr)
      : fire_(std::move(fire)), owner_(owner) {}
  ~Timer() { cancel(); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  bool armed() const { return loop_ != nullptr; }
  void cancel();

 private:
  friend class Loop;
  std::function<void()> fire_;
  Faultable* const owner_;
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

  // When the kernel refuses to watch `fd`, the target's onFault() is called, in this turn or the next.
  void add(int fd, uint32_t events, Pollable& target);
  void modify(int fd, uint32_t events, Pollable& target);
  void remove(int fd, Pollable& target);

  // Replaces an earlier deadline of the same timer. Throws std::bad_alloc, and the timer is not armed then.
  void arm(Timer& timer, uint64_t delay_us);
  void dispose(std::unique_ptr<Disposable> object) noexcept;
  void destroyDisposed();

  // Runs `work`; an exception of it is counted, told, and ends `owner` (which may be null) instead of the
  // process. False: it threw.
  template <typename F>
  bool guard(const char* where, Faultable* owner, F&& work) noexcept {
    try {
      work();
      return true;
    } catch (const std::exception& error) {
      fault(where, owner, error.what());
    } catch (...) {
      fault(where, owner, "an exception of unknown type");
    }
    return false;
  }
  // Any thread: how many exceptions and refusals to watch a descriptor there were.
  uint64_t faults() const { return faults_.load(std::memory_order_relaxed); }
  // Told of each; set before the first turn.
  void onFault(std::function<void(const char* where, const char* what)> told) { told_ = std::move(told); }

  // Any thread. Runs `task` in the loop's thread; false (and never) once closeMailbox() was called. A task
  // that throws is run again a few times, those behind it wait: it must bear being begun anew.
  bool post(std::function<void()> task);
  void closeMailbox();

  uint64_t nowUs() const { return now_us_; }  // monotonic, as of this turn

 private:
  friend class Timer;
  void fireTimers();
  void runMailbox();
  void runPending();
  void control(int operation, int fd, uint32_t events, Pollable& target);
  void fault(const char* where, Faultable* owner, const char* what) noexcept;
  void endFaulted() noexcept;
  void siftUp(size_t slot);
  void siftDown(size_t slot);
  void erase(Timer& timer);

  Fd epoll_, wake_;
  uint64_t now_us_ = 0;
  std::vector<Timer*> heap_;
  Disposable* disposed_ = nullptr;
  List<Faultable> faulted_;
  std::atomic<uint64_t> faults_{0};
  std::function<void(const char*, const char*)> told_;
  std::list<std::function<void()>> pending_;  // taken from the mailbox and not run yet
  unsigned pending_failures_ = 0;             // of the first of them
  std::mutex mutex_;                          // guards the two below
  std::list<std::function<void()>> mailbox_;
  bool mailbox_closed_ = false;
  Timer pending_timer_;
};

// Monotonic microseconds.
uint64_t monotonicUs();

}  // namespace ebbtide
