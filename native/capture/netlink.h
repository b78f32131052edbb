// Netlink questions asked inside a pod's namespace: which interfaces lead to the host, which connections are
// open.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <capture.h>

namespace ebbtide::capture {

// An interface of a pod and where its other end is.
struct PodInterface {
  std::string name;
  std::string kind;  // "veth", "netkit", "macvlan", ..., "" if it has none
  bool up = false;
  int peer_index = 0;         // interface index in the namespace of its other end, 0 if unknown
  bool peer_is_here = false;  // the other end is in the namespace that was given
  uint64_t sent_bytes = 0, received_bytes = 0;  // since it was made
};

// Interfaces of the pod but loopback. `host_netns_fd` is the namespace in which the other ends should be.
std::vector<PodInterface> podInterfaces(int netns_fd, int host_netns_fd);

struct Connection {
  ebb_tuple tuple;
  bool answered;  // past SYN_SENT
};

// TCP connections of the namespace in any state between SYN_SENT and CLOSING; the cookie is filled in.
std::vector<Connection> openConnections(int netns_fd, uint64_t cookie);

// A BPF filter at an interface's clsact ingress.
struct TcFilter {
  int interface_index = 0;
  uint32_t priority = 0;
  uint32_t program = 0;
};

// All of the caller's network namespace, interface by interface in the order in which they run.
std::vector<TcFilter> ingressFilters();

}  // namespace ebbtide::capture
