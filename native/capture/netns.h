// Network namespaces: opened, verified, asked. Work inside one is done on a thread of its own, because setns
// is per thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "address.h"
#include "fd.h"

namespace ebbtide::capture {

// Opens a path and verifies with NS_GET_NSTYPE that it is a network namespace.
Fd openNetns(const std::string& path);
// Throws unless the descriptor is a network namespace.
void verifyNetns(int fd, const std::string& name);
uint64_t netnsInode(int fd);
// SO_NETNS_COOKIE of a socket made inside: the name the kernel's programs know it by.
uint64_t netnsCookie(int fd);
// All addresses of all interfaces, loopback's too.
std::vector<Address> netnsAddresses(int fd);
// Text of a file as it is inside: what is below /proc/sys/net belongs to a namespace.
std::string readInNetns(int fd, const std::string& path);
// Runs the function inside the namespace on a new thread and waits; its exception comes out here.
void inNetns(int fd, const std::function<void()>& function);

}  // namespace ebbtide::capture
