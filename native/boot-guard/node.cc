// mountinfo, and names of directories.
#include "node.h"

#include <dirent.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "error.h"
#include "pins.h"

namespace ebbtide::boot_guard {

using capture::CaptureError;

namespace {

// Undoes the octal escapes of mountinfo (proc(5)).
std::string unescape(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size(); i++) {
    bool octal = text[i] == '\\' && i + 3 < text.size() && text.find_first_not_of("01234567", i + 1) >= i + 4;
    if (octal) {
      result += static_cast<char>(std::stoi(text.substr(i + 1, 3), nullptr, 8));
      i += 3;
    } else {
      result += text[i];
    }
  }
  return result;
}

// Only the true root has no cgroup.events: a cgroup namespace shows "/" for its own root as well.
bool isCgroupRoot(const std::string& path) {
  return capture::exists(path + "/cgroup.procs") && !capture::exists(path + "/cgroup.events");
}

}  // namespace

std::string findCgroupRoot() {
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    // "36 35 98:0 ROOT MOUNTPOINT options [optional fields] - TYPE source superoptions"
    if (line.find(" - cgroup2 ") == std::string::npos) continue;
    std::istringstream fields(line);
    std::string id, parent, device, root, point;
    fields >> id >> parent >> device >> root >> point;
    point = unescape(point);
    if (root == "/" && isCgroupRoot(point)) return point;
  }
  throw CaptureError("finding the root of cgroup2", ENOENT,
                     "none is mounted; mount -t cgroup2 none /sys/fs/cgroup/unified, or give --cgroup");
}

std::string bootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  return text;
}

std::set<std::string> podsOf(const std::string& daemonset, const std::string& pod_logs) {
  if (access(pod_logs.c_str(), R_OK)) throw CaptureError("looking for pods' logs in " + pod_logs, errno);
  std::string prefix = daemonset;
  prefix[prefix.find('/')] = '_';
  prefix += '-';
  std::set<std::string> uids;
  for (const std::string& name : capture::listDirectory(pod_logs))
    if (name.starts_with(prefix)) uids.insert(name.substr(name.rfind('_') + 1));
  return uids;
}

}  // namespace ebbtide::boot_guard
