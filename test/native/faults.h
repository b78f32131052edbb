// Failures of memory and of the kernel, on the threads of engines only. Linked by way of --wrap, see
// Makefile.
#pragma once

#include <cstdint>

namespace ebbtide::test::faults {

// The n-th allocation of an engine's thread from now on throws std::bad_alloc, 1 being the next; 0: none
// does.
void failAllocation(int64_t n);
// Whether that one has come.
bool allocationFailed();
// The next n descriptors that an engine's thread gives to epoll are refused with ENOSPC, as when the user's
// watches are used up.
void failWatching(int n);

}  // namespace ebbtide::test::faults
