// BPF_PROG_QUERY, BPF_LINK_GET_NEXT_ID and the objects' own descriptions.
#include "attached.h"

#include <bpf/bpf.h>
#include <dirent.h>
#include <fcntl.h>
#include <net/if.h>
#include <sys/stat.h>

#include <array>

#include "error.h"
#include "fd.h"
#include "netlink.h"
#include "netns.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

constexpr unsigned kMaxPrograms = 128;
constexpr auto kTcxIngress = static_cast<bpf_attach_type>(46);  // BPF_TCX_INGRESS, Linux 6.6
constexpr uint32_t kLinkTypeTcx = 11;                           // BPF_LINK_TYPE_TCX

struct CgroupHook {
  bpf_attach_type type;
  const char* name;
};
constexpr CgroupHook kCgroupHooks[] = {
    {BPF_CGROUP_INET4_CONNECT, "connect4"},
    {BPF_CGROUP_INET6_CONNECT, "connect6"},
    {BPF_CGROUP_INET4_BIND, "bind4"},
    {BPF_CGROUP_INET6_BIND, "bind6"},
    {BPF_CGROUP_INET4_GETPEERNAME, "getpeername4"},
    {BPF_CGROUP_INET6_GETPEERNAME, "getpeername6"},
    {BPF_CGROUP_INET4_GETSOCKNAME, "getsockname4"},
    {BPF_CGROUP_INET6_GETSOCKNAME, "getsockname6"},
    {BPF_CGROUP_GETSOCKOPT, "getsockopt"},
    {BPF_CGROUP_SOCK_OPS, "sockops"},
    {BPF_CGROUP_INET_INGRESS, "skb ingress"},
    {BPF_CGROUP_INET_EGRESS, "skb egress"},
};

// Empty where the kernel does not know the hook.
AttachedPrograms query(int target, bpf_attach_type type, const char* name) {
  AttachedPrograms found{name, 0, {}};
  std::array<uint32_t, kMaxPrograms> ids;
  uint32_t count = ids.size();
  if (!bpf_prog_query(target, type, 0, &found.attach_flags, ids.data(), &count))
    found.programs.assign(ids.begin(), ids.begin() + count);
  else if (errno == EPERM)
    throw CaptureError("asking which BPF programs are attached", errno, "CAP_NET_ADMIN is needed");
  return found;
}

template <typename Info>
bool describe(int fd, Info& info) {
  uint32_t size = sizeof(info);
  info = {};
  return !bpf_obj_get_info_by_fd(fd, &info, &size);
}

// A bpffs has directories, programs, maps and links; a descriptor tells which by whether it can be described
// as one.
void collectPinned(const std::string& directory, PinnedObjects& found) {
  for (const std::string& name : listDirectory(directory)) {
    std::string path = directory + "/" + name;
    struct stat status;
    if (lstat(path.c_str(), &status)) continue;
    if (S_ISDIR(status.st_mode)) {
      collectPinned(path, found);
      continue;
    }
    Fd fd(bpf_obj_get(path.c_str()));
    if (!fd) continue;
    std::string target(256, 0);
    ssize_t length =
        readlink(("/proc/self/fd/" + std::to_string(fd.get())).c_str(), target.data(), target.size());
    target.resize(length > 0 ? static_cast<size_t>(length) : 0);
    bpf_prog_info program;
    bpf_link_info link;
    if (target.find("bpf-prog") != std::string::npos && describe(fd.get(), program)) {
      found.programs.push_back(program.id);
    } else if (target.find("bpf_link") != std::string::npos || target.find("bpf-link") != std::string::npos) {
      if (!describe(fd.get(), link)) continue;
      found.links.push_back(link.id);
      found.programs.push_back(link.prog_id);
    }
  }
}

}  // namespace

std::vector<AttachedPrograms> attachedToCgroup(const std::string& path) {
  Fd cgroup(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!cgroup) throw CaptureError("opening " + path, errno);
  std::vector<AttachedPrograms> result;
  for (const CgroupHook& hook : kCgroupHooks) {
    AttachedPrograms found = query(cgroup.get(), hook.type, hook.name);
    if (!found.programs.empty()) result.push_back(std::move(found));
  }
  return result;
}

std::vector<BpfLink> bpfLinks() {
  std::vector<BpfLink> links;
  for (uint32_t id = 0; !bpf_link_get_next_id(id, &id);) {
    Fd fd(bpf_link_get_fd_by_id(id));
    bpf_link_info info;
    if (!fd || !describe(fd.get(), info)) continue;
    BpfLink link{id, info.prog_id, "", 0, 0};
    if (info.type == BPF_LINK_TYPE_CGROUP) {
      link.kind = "cgroup";
      link.target = info.cgroup.cgroup_id;
      link.attach_type = info.cgroup.attach_type;
    } else if (info.type == BPF_LINK_TYPE_NETNS) {
      link.kind = "netns";
      link.target = info.netns.netns_ino;
      link.attach_type = info.netns.attach_type;
    } else if (info.type == kLinkTypeTcx) {
      link.kind = "tcx";
      link.target = info.xdp.ifindex;  // in the same place
    } else {
      continue;
    }
    links.push_back(std::move(link));
  }
  return links;
}

BpfProgram bpfProgram(uint32_t id) {
  BpfProgram program{id, "", 0, 0};
  Fd fd(bpf_prog_get_fd_by_id(id));
  bpf_prog_info info;
  if (!fd || !describe(fd.get(), info)) return program;
  program.name = info.name[0] ? info.name : "(no name)";
  program.type = info.type;
  program.uid = info.created_by_uid;
  return program;
}

std::vector<InterfacePrograms> ingressPrograms(int netns_fd) {
  std::vector<InterfacePrograms> result;
  inNetns(netns_fd, [&] {
    struct if_nameindex* interfaces = if_nameindex();
    if (!interfaces) throw CaptureError("listing interfaces", errno);
    for (auto* each = interfaces; each->if_index; each++) {
      int index = static_cast<int>(each->if_index);
      for (uint32_t id : query(index, kTcxIngress, "tcx ingress").programs)
        result.push_back({each->if_name, index, "tcx", 0, id});
    }
    for (const TcFilter& filter : ingressFilters())
      for (auto* each = interfaces; each->if_index; each++)
        if (static_cast<int>(each->if_index) == filter.interface_index)
          result.push_back({each->if_name, filter.interface_index, "tc", filter.priority, filter.program});
    if_freenameindex(interfaces);
  });
  return result;
}

PinnedObjects pinnedObjects(const std::string& directory) {
  PinnedObjects found;
  collectPinned(directory, found);
  return found;
}

}  // namespace ebbtide::capture
