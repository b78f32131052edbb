// The event loop.
#include "loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace ebbtide {

uint64_t monotonicUs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

void Timer::cancel() {
  if (loop_ != nullptr) loop_->erase(*this);
}

namespace {

constexpr uint64_t kTryAgainUs = 50'000;
constexpr unsigned kTaskTries = 10;

}  // namespace

Loop::Loop()
    : epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      pending_timer_([this] { runPending(); }) {
  epoll_event event{};
  event.events = EPOLLIN;
  if (!epoll_ || !wake_ || epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0) {
    throw std::runtime_error(std::string("epoll or eventfd: ") + std::strerror(errno));
  }
  now_us_ = monotonicUs();
}

Loop::~Loop() {
  destroyDisposed();
  while (!heap_.empty()) erase(*heap_.back());
}

void Loop::turn(int max_wait_ms) {
  int wait = max_wait_ms;
  if (!heap_.empty()) {
    uint64_t now = monotonicUs();
    uint64_t due = heap_.front()->deadline_us_;
    int until = due <= now ? 0 : static_cast<int>(std::min<uint64_t>((due - now + 999) / 1000, 60'000));
    wait = wait < 0 ? until : std::min(wait, until);
  }
  if (!faulted_.empty()) wait = wait < 0 ? 1 : std::min(wait, 1);
  epoll_event events[128];
  int count = epoll_wait(epoll_.get(), events, 128, wait);
  now_us_ = monotonicUs();
  bool mail = false;
  for (int i = 0; i < count; i++) {
    if (events[i].data.ptr == nullptr) {
      mail = true;
    } else {
      auto* target = static_cast<Pollable*>(events[i].data.ptr);
      guard("connection", target, [&] { target->onEvents(events[i].events); });
    }
  }
  if (mail) runMailbox();
  fireTimers();
  endFaulted();
}

void Loop::add(int fd, uint32_t events, Pollable& target) {
  control(EPOLL_CTL_ADD, fd, events, target);
}

void Loop::modify(int fd, uint32_t events, Pollable& target) {
  control(EPOLL_CTL_MOD, fd, events, target);
}

// Fails for want of memory or of watches. The callers are in the midst of things, so it is told later.
void Loop::control(int operation, int fd, uint32_t events, Pollable& target) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = &target;
  if (epoll_ctl(epoll_.get(), operation, fd, &event) == 0) return;
  target.watch_error_ = errno;
  faulted_.pushBack(target.fault_hook_);
}

void Loop::remove(int fd, Pollable& target) {
  target.fault_hook_.unlink();
  target.watch_error_ = 0;
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

void Loop::fault(const char* where, Faultable* owner, const char* what) noexcept {
  faults_.fetch_add(1, std::memory_order_relaxed);
  try {
    if (told_) told_(where, what);
  } catch (...) {  // it is counted
  }
  if (owner == nullptr) return;
  try {
    owner->onFault(what);
  } catch (...) {
    faulted_.pushBack(owner->fault_hook_);
  }
}

void Loop::endFaulted() noexcept {
  List<Faultable> all;
  faulted_.moveTo(all);
  while (Faultable* one = all.popFront()) {
    char text[96] = "std::bad_alloc";
    if (one->watch_error_ != 0) {
      snprintf(text, sizeof text, "the kernel does not watch the connection: %s",
               strerrordesc_np(one->watch_error_));
      one->watch_error_ = 0;
    }
    fault("watch", one, text);
  }
}

void Loop::dispose(std::unique_ptr<Disposable> object) noexcept {
  object->next_disposed_ = disposed_;
  disposed_ = object.release();
}

void Loop::destroyDisposed() {
  // A destructor may dispose of more.
  while (disposed_ != nullptr) {
    std::unique_ptr<Disposable> first(disposed_);
    disposed_ = first->next_disposed_;
  }
}

bool Loop::post(std::function<void()> task) {
  {
    std::lock_guard lock(mutex_);
    if (mailbox_closed_) return false;
    mailbox_.push_back(std::move(task));
    if (mailbox_.size() > 1) return true;  // woken already
  }
  uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
  return true;
}

void Loop::closeMailbox() {
  std::list<std::function<void()>> dropped;  // destroyed without the lock: what they hold may call anything
  {
    std::lock_guard lock(mutex_);
    mailbox_closed_ = true;
    dropped.splice(dropped.end(), mailbox_);
  }
  dropped.splice(dropped.begin(), pending_);
}

void Loop::runMailbox() {
  uint64_t count = 0;
  (void)!read(wake_.get(), &count, sizeof count);
  {
    std::lock_guard lock(mutex_);
    pending_.splice(pending_.end(), mailbox_);
  }
  runPending();
}

// In their order, which removing a pod and adding it again depends on.
void Loop::runPending() {
  while (!pending_.empty()) {
    if (!guard("task", nullptr, pending_.front()) && ++pending_failures_ < kTaskTries) {
      arm(pending_timer_, kTryAgainUs);
      return;
    }
    pending_failures_ = 0;
    pending_.pop_front();
  }
}

void Loop::arm(Timer& timer, uint64_t delay_us) {
  if (timer.loop_ != nullptr) erase(timer);
  heap_.push_back(&timer);  // may throw, and then the timer is not armed
  timer.loop_ = this;
  timer.deadline_us_ = now_us_ + delay_us;
  timer.slot_ = heap_.size() - 1;
  siftUp(timer.slot_);
}

void Loop::fireTimers() {
  while (!heap_.empty() && heap_.front()->deadline_us_ <= now_us_) {
    Timer* timer = heap_.front();
    erase(*timer);
    Faultable* owner = timer->owner_;
    // Erasing left room in the heap, so that arming one timer cannot fail; and who has no owner is not gone.
    if (!guard("timer", owner, timer->fire_) && owner == nullptr && !timer->armed()) arm(*timer, kTryAgainUs);
  }
}

void Loop::erase(Timer& timer) {
  size_t slot = timer.slot_;
  timer.loop_ = nullptr;
  Timer* last = heap_.back();
  heap_.pop_back();
  if (last == &timer) return;
  heap_[slot] = last;
  last->slot_ = slot;
  siftUp(slot);
  siftDown(last->slot_);
}

void Loop::siftUp(size_t slot) {
  while (slot > 0) {
    size_t parent = (slot - 1) / 2;
    if (heap_[parent]->deadline_us_ <= heap_[slot]->deadline_us_) return;
    std::swap(heap_[parent], heap_[slot]);
    heap_[parent]->slot_ = parent;
    heap_[slot]->slot_ = slot;
    slot = parent;
  }
}

void Loop::siftDown(size_t slot) {
  for (;;) {
    size_t child = slot * 2 + 1;
    if (child >= heap_.size()) return;
    if (child + 1 < heap_.size() && heap_[child + 1]->deadline_us_ < heap_[child]->deadline_us_) child++;
    if (heap_[slot]->deadline_us_ <= heap_[child]->deadline_us_) return;
    std::swap(heap_[slot], heap_[child]);
    heap_[slot]->slot_ = slot;
    heap_[child]->slot_ = child;
    slot = child;
  }
}

}  // namespace ebbtide
