// bpf(2) object commands and the few file system calls that a bpffs understands.
#include "pins.h"

#include <bpf/bpf.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>

#include "error.h"
#include "guard.h"

namespace ebbtide::capture {

namespace {

bool isBpffs(const std::string& path) {
  struct statfs info;
  return !statfs(path.c_str(), &info) && static_cast<unsigned long>(info.f_type) == BPF_FS_MAGIC;
}

std::string parentOf(const std::string& path) {
  auto slash = path.rfind('/');
  return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

void makeParents(const std::string& path) {
  if (path == "/" || exists(path)) return;
  makeParents(parentOf(path));
  makeDirectory(path);
}

}  // namespace

bool exists(const std::string& path) {
  struct stat info;
  return !lstat(path.c_str(), &info);
}

void makeDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) && errno != EEXIST) throw CaptureError("making directory " + path, errno);
}

void makePinDirectory(const std::string& path) {
  if (path.empty() || path[0] != '/' || path.back() == '/')
    throw CaptureError("pin directory '" + path + "' must be an absolute path", EINVAL);
  std::string parent = parentOf(path);
  std::string existing = path;
  while (!exists(existing)) existing = parentOf(existing);
  if (!isBpffs(existing)) {
    if (existing == path)
      throw CaptureError(path + " is not on a bpffs", EINVAL,
                         "remove it, or name a directory that does not exist yet");
    if (parent == "/") throw CaptureError("pin directory " + path + " is directly below /", EINVAL);
    makeParents(parent);
    if (mount("bpf", parent.c_str(), "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"))
      throw CaptureError("mounting a bpffs at " + parent, errno,
                         "CAP_SYS_ADMIN is needed, or mount it beforehand");
  }
  makeParents(path);
}

Fd lockPins(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw CaptureError("opening " + path, errno);
  if (flock(fd.get(), LOCK_EX | LOCK_NB)) throw PinsLocked("locking " + path, errno, "another agent uses it");
  return fd;
}

std::vector<std::string> listDirectory(const std::string& path) {
  std::vector<std::string> names;
  DIR* directory = opendir(path.c_str());
  if (!directory) {
    if (errno == ENOENT) return names;
    throw CaptureError("listing " + path, errno);
  }
  while (dirent* entry = readdir(directory)) {
    std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  closedir(directory);
  std::sort(names.begin(), names.end());
  return names;
}

Fd openPin(const std::string& path) {
  Fd fd(bpf_obj_get(path.c_str()));
  if (!fd && errno != ENOENT) throw CaptureError("opening pin " + path, errno);
  return fd;
}

void pin(int fd, const std::string& path) {
  if (bpf_obj_pin(fd, path.c_str())) throw CaptureError("pinning " + path, errno);
}

void unpin(const std::string& path) {
  if (unlink(path.c_str()) && errno != ENOENT) throw CaptureError("removing pin " + path, errno);
}

uint64_t linkTarget(int link_fd) {
  bpf_link_info info{};
  unsigned size = sizeof(info);
  if (bpf_obj_get_info_by_fd(link_fd, &info, &size))
    throw CaptureError("asking what a BPF link is attached to", errno);
  switch (info.type) {
    case BPF_LINK_TYPE_CGROUP:
      return info.cgroup.cgroup_id;
    case BPF_LINK_TYPE_NETNS:
      return info.netns.netns_ino;
    default:
      return info.xdp.ifindex;  // tcx has its index in the same place
  }
}

void updateLink(int link_fd, int program_fd, const std::string& path) {
  if (bpf_link_update(link_fd, program_fd, nullptr))
    throw CaptureError("replacing the program of " + path, errno);
}

void removeLink(const std::string& path) {
  Fd link = openPin(path);
  // The pin may not be the last reference, so the link itself is taken down first. A link whose target is
  // gone says ENOLINK or EINVAL by kind and version; what counts is that nothing is attached.
  if (link) bpf_link_detach(link.get());
  unpin(path);
}

unsigned removePins(const std::string& directory) {
  unsigned count = 0;
  for (const std::string& name : listDirectory(directory)) {
    std::string path = directory + "/" + name;
    struct stat info;
    if (lstat(path.c_str(), &info)) continue;
    if (S_ISDIR(info.st_mode)) {
      count += removePins(path);
      continue;
    }
    if (isClassicGuardPin(name)) removeClassicGuard(path, name);
    Fd object = openPin(path);
    if (object) bpf_link_detach(object.get());  // EINVAL for maps and programs
    unpin(path);
    count++;
  }
  if (rmdir(directory.c_str()) && errno != ENOENT)
    throw CaptureError("removing directory " + directory, errno);
  return count;
}

}  // namespace ebbtide::capture
