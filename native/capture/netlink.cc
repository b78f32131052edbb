// rtnetlink (RTM_GETLINK, RTM_GETNSID) and sock_diag (inet_diag_req_v2) dumps.
#include "netlink.h"

#include <arpa/inet.h>
#include <linux/if_link.h>
#include <linux/inet_diag.h>
#include <linux/net_namespace.h>
#include <linux/netlink.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "address.h"
#include "error.h"
#include "fd.h"
#include "netns.h"

namespace ebbtide::capture {

namespace {

using Handler = std::function<void(const nlmsghdr*)>;

Fd openNetlink(int protocol) {
  Fd fd(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol));
  if (!fd) throw CaptureError("opening a netlink socket", errno);
  timeval timeout{5, 0};
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  return fd;
}

// Sends one request and gives each answer to the handler until the dump, or the single answer, is over.
void ask(int fd, const void* request, size_t size, bool dump, const char* what, const Handler& handler) {
  sockaddr_nl kernel{};
  kernel.nl_family = AF_NETLINK;
  if (sendto(fd, request, size, 0, reinterpret_cast<sockaddr*>(&kernel), sizeof(kernel)) < 0)
    throw CaptureError(what, errno);
  alignas(nlmsghdr) static thread_local char buffer[65536];
  while (true) {
    ssize_t got = recv(fd, buffer, sizeof(buffer), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw CaptureError(what, errno);
    unsigned left = static_cast<unsigned>(got);
    for (auto* message = reinterpret_cast<nlmsghdr*>(buffer); NLMSG_OK(message, left);
         message = NLMSG_NEXT(message, left)) {
      if (message->nlmsg_type == NLMSG_DONE) return;
      if (message->nlmsg_flags & NLM_F_DUMP_INTR) throw CaptureError(what, EAGAIN, "it changed meanwhile");
      if (message->nlmsg_type == NLMSG_ERROR) {
        int error = -static_cast<nlmsgerr*>(NLMSG_DATA(message))->error;
        if (error) throw CaptureError(what, error);
        return;
      }
      handler(message);
      if (!dump) return;
    }
  }
}

// Number by which this namespace knows the other one, -1 if it has none.
int namespaceId(int netlink_fd, int other_netns_fd) {
  struct {
    nlmsghdr header;
    rtgenmsg message;
    alignas(NLMSG_ALIGNTO) rtattr attribute;
    uint32_t fd;
  } request{};
  static_assert(sizeof(request) == 28);
  request.header = {sizeof(request), RTM_GETNSID, NLM_F_REQUEST, 1, 0};
  request.message.rtgen_family = AF_UNSPEC;
  request.attribute = {RTA_LENGTH(sizeof(uint32_t)), NETNSA_FD};
  request.fd = static_cast<uint32_t>(other_netns_fd);
  int id = -1;
  ask(netlink_fd, &request, sizeof(request), false, "asking for the number of a network namespace",
      [&](const nlmsghdr* message) {
        auto* attribute = reinterpret_cast<const rtattr*>(static_cast<const char*>(NLMSG_DATA(message)) +
                                                          NLMSG_ALIGN(sizeof(rtgenmsg)));
        int left = static_cast<int>(NLMSG_PAYLOAD(message, NLMSG_ALIGN(sizeof(rtgenmsg))));
        for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
          if (attribute->rta_type == NETNSA_NSID) std::memcpy(&id, RTA_DATA(attribute), sizeof(id));
      });
  return id;
}

PodInterface readInterface(const nlmsghdr* message, int host_id) {
  auto* info = static_cast<const ifinfomsg*>(NLMSG_DATA(message));
  PodInterface result;
  result.up = info->ifi_flags & IFF_UP;
  int peer_namespace = -1;
  int left = static_cast<int>(IFLA_PAYLOAD(message));
  for (auto* attribute = IFLA_RTA(info); RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
    const char* data = static_cast<const char*>(RTA_DATA(attribute));
    switch (attribute->rta_type & NLA_TYPE_MASK) {
      case IFLA_IFNAME:
        result.name = data;
        break;
      case IFLA_LINK:
        std::memcpy(&result.peer_index, data, sizeof(result.peer_index));
        break;
      case IFLA_LINK_NETNSID:
        std::memcpy(&peer_namespace, data, sizeof(peer_namespace));
        break;
      case IFLA_STATS64: {
        rtnl_link_stats64 stats{};
        std::memcpy(&stats, data, std::min<size_t>(sizeof(stats), RTA_PAYLOAD(attribute)));
        result.sent_bytes = stats.tx_bytes;
        result.received_bytes = stats.rx_bytes;
        break;
      }
      case IFLA_LINKINFO: {
        int inner_left = static_cast<int>(RTA_PAYLOAD(attribute));
        auto* inner = reinterpret_cast<const rtattr*>(data);
        for (; RTA_OK(inner, inner_left); inner = RTA_NEXT(inner, inner_left))
          if (inner->rta_type == IFLA_INFO_KIND) result.kind = static_cast<const char*>(RTA_DATA(inner));
        break;
      }
    }
  }
  result.peer_is_here = peer_namespace >= 0 && peer_namespace == host_id;
  return result;
}

Connection readConnection(const inet_diag_msg* message, uint64_t cookie) {
  ebb_tuple tuple{};
  tuple.cookie = cookie;
  auto copy = [&](uint32_t* to, const uint32_t* from) {
    Address address =
        message->idiag_family == AF_INET ? mapIp4(from[0]) : Address{from[0], from[1], from[2], from[3]};
    std::memcpy(to, address.data(), sizeof(address));
  };
  copy(tuple.local, message->id.idiag_src);
  copy(tuple.remote, message->id.idiag_dst);
  tuple.local_port = ntohs(message->id.idiag_sport);
  tuple.remote_port = ntohs(message->id.idiag_dport);
  return {tuple, message->idiag_state != TCP_SYN_SENT};
}

// Program of a tc filter of kind "bpf", 0 for others.
uint32_t filterProgram(const nlmsghdr* message) {
  auto* info = static_cast<const tcmsg*>(NLMSG_DATA(message));
  bool is_bpf = false;
  uint32_t program = 0;
  int left = static_cast<int>(TCA_PAYLOAD(message));
  for (auto* attribute = TCA_RTA(info); RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
    if (attribute->rta_type == TCA_KIND)
      is_bpf = !std::strcmp(static_cast<const char*>(RTA_DATA(attribute)), "bpf");
    if ((attribute->rta_type & NLA_TYPE_MASK) != TCA_OPTIONS) continue;
    int inner_left = static_cast<int>(RTA_PAYLOAD(attribute));
    auto* inner = reinterpret_cast<const rtattr*>(RTA_DATA(attribute));
    for (; RTA_OK(inner, inner_left); inner = RTA_NEXT(inner, inner_left))
      if (inner->rta_type == TCA_BPF_ID) std::memcpy(&program, RTA_DATA(inner), sizeof(program));
  }
  return is_bpf ? program : 0;
}

// Each interface of the namespace that the descriptor is of.
void eachInterface(int netlink_fd, const char* what,
                   const std::function<void(const nlmsghdr*, const ifinfomsg*)>& look) {
  struct {
    nlmsghdr header;
    ifinfomsg message;
  } request{};
  request.header = {sizeof(request), RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 2, 0};
  ask(netlink_fd, &request, sizeof(request), true, what, [&](const nlmsghdr* message) {
    if (message->nlmsg_type == RTM_NEWLINK) look(message, static_cast<const ifinfomsg*>(NLMSG_DATA(message)));
  });
}

}  // namespace

std::vector<TcFilter> ingressFilters() {
  std::vector<TcFilter> filters;
  Fd fd = openNetlink(NETLINK_ROUTE);
  std::vector<int> indices;
  eachInterface(fd.get(), "listing interfaces",
                [&](const nlmsghdr*, const ifinfomsg* info) { indices.push_back(info->ifi_index); });
  for (int index : indices) {
    struct {
      nlmsghdr header;
      tcmsg message;
    } request{};
    request.header = {sizeof(request), RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, 5, 0};
    request.message.tcm_family = AF_UNSPEC;
    request.message.tcm_ifindex = index;
    request.message.tcm_parent = TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS);
    // Without a clsact qdisc the answer is an empty list.
    ask(fd.get(), &request, sizeof(request), true, "listing tc filters", [&](const nlmsghdr* message) {
      if (message->nlmsg_type != RTM_NEWTFILTER) return;
      auto* info = static_cast<const tcmsg*>(NLMSG_DATA(message));
      if (uint32_t program = filterProgram(message))
        filters.push_back({index, TC_H_MAJ(info->tcm_info) >> 16, program});
    });
  }
  return filters;
}

std::vector<PodInterface> podInterfaces(int netns_fd, int host_netns_fd) {
  std::vector<PodInterface> interfaces;
  inNetns(netns_fd, [&] {
    Fd fd = openNetlink(NETLINK_ROUTE);
    int host_id = namespaceId(fd.get(), host_netns_fd);
    eachInterface(fd.get(), "listing the interfaces of a pod",
                  [&](const nlmsghdr* message, const ifinfomsg* info) {
                    if (!(info->ifi_flags & IFF_LOOPBACK))
                      interfaces.push_back(readInterface(message, host_id));
                  });
  });
  return interfaces;
}

std::vector<Connection> openConnections(int netns_fd, uint64_t cookie) {
  std::vector<Connection> connections;
  inNetns(netns_fd, [&] {
    Fd fd = openNetlink(NETLINK_SOCK_DIAG);
    for (uint8_t family : {AF_INET, AF_INET6}) {
      struct {
        nlmsghdr header;
        inet_diag_req_v2 message;
      } request{};
      request.header = {sizeof(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 3, 0};
      request.message.sdiag_family = family;
      request.message.sdiag_protocol = IPPROTO_TCP;
      request.message.idiag_states = 1u << TCP_ESTABLISHED | 1u << TCP_SYN_SENT | 1u << TCP_SYN_RECV |
                                     1u << TCP_FIN_WAIT1 | 1u << TCP_FIN_WAIT2 | 1u << TCP_CLOSE_WAIT |
                                     1u << TCP_LAST_ACK | 1u << TCP_CLOSING;
      ask(fd.get(), &request, sizeof(request), true, "listing the connections of a pod",
          [&](const nlmsghdr* message) {
            if (message->nlmsg_type != SOCK_DIAG_BY_FAMILY) return;
            auto* found = static_cast<const inet_diag_msg*>(NLMSG_DATA(message));
            // Closed by its process, its end acknowledged: nothing will be sent any more.
            if (found->idiag_state == TCP_FIN_WAIT2 && found->idiag_inode == 0) return;
            connections.push_back(readConnection(found, cookie));
          });
    }
  });
  return connections;
}

}  // namespace ebbtide::capture
