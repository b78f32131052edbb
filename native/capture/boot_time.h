// The kernel's clock since boot, which the BPF programs stamp with (bpf_ktime_get_boot_ns): it goes on while
// the machine sleeps, and nobody sets it.
#pragma once

#include <cstdint>
#include <ctime>

namespace ebbtide::capture {

// Nanoseconds.
inline uint64_t bootTime() {
  timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace ebbtide::capture
