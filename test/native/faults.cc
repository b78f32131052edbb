// Failures on demand.
#include "faults.h"

#include <sys/epoll.h>
#include <sys/prctl.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <new>

namespace ebbtide::test::faults {
namespace {

std::atomic<int64_t> allocations_left{0};
std::atomic<int> refusals_left{0};

bool inEngine() {
  static thread_local bool known = false;
  if (known) return true;
  char name[16] = "";
  prctl(PR_GET_NAME, name);
  known = std::strncmp(name, "engine-", 7) == 0;
  return known;
}

bool allocationFails() {
  if (allocations_left.load(std::memory_order_relaxed) <= 0 || !inEngine()) return false;
  return allocations_left.fetch_sub(1, std::memory_order_relaxed) == 1;
}

}  // namespace

void failAllocation(int64_t n) {
  allocations_left = n;
}

bool allocationFailed() {
  return allocations_left <= 0;
}

void failWatching(int n) {
  refusals_left = n;
}

}  // namespace ebbtide::test::faults

extern "C" {

void* __real__Znwm(size_t size);  // operator new
void* __real__Znam(size_t size);  // operator new[]
int __real_epoll_ctl(int epoll, int operation, int fd, epoll_event* event);

void* __wrap__Znwm(size_t size) {
  if (ebbtide::test::faults::allocationFails()) throw std::bad_alloc();
  return __real__Znwm(size);
}

void* __wrap__Znam(size_t size) {
  if (ebbtide::test::faults::allocationFails()) throw std::bad_alloc();
  return __real__Znam(size);
}

int __wrap_epoll_ctl(int epoll, int operation, int fd, epoll_event* event) {
  using namespace ebbtide::test::faults;
  if (operation == EPOLL_CTL_ADD && refusals_left.load() > 0 && inEngine() &&
      refusals_left.fetch_sub(1) > 0) {
    errno = ENOSPC;
    return -1;
  }
  return __real_epoll_ctl(epoll, operation, fd, event);
}
}
