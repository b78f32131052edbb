// What is pinned is held by this process as well, and pinned again when somebody empties the bpffs.
#include <bpf/bpf.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>

#include "error.h"
#include "guard.h"
#include "node_capture.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

std::string parentOf(const std::string& path) {
  return path.substr(0, path.rfind('/'));
}

std::string nameOf(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

bool isSame(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

}  // namespace

// Pins of a directory, in the place of those that were held before.
void NodeCapture::keep(const std::string& directory) {
  for (const std::string& name : listDirectory(directory)) {
    std::string path = directory + "/" + name;
    if (Fd fd = openPin(path)) kept_[path] = std::move(fd);
  }
}

void NodeCapture::letGo(const std::string& directory) {
  std::erase_if(kept_, [&](const auto& each) { return parentOf(each.first) == directory; });
}

// The lock is on a directory: one that was made anew is another one, which another agent may lock.
void NodeCapture::lockAgain() {
  makePinDirectory(pin_directory_);
  struct stat held, there;
  if (fstat(lock_.get(), &held) || stat(pin_directory_.c_str(), &there))
    throw CaptureError("looking for " + pin_directory_, errno);
  if (!isSame(held, there)) lock_ = lockPins(pin_directory_);
}

// Whether a link's hook has let go of it, or somebody has taken a guard's filter away. Other programs and
// maps are never attached by themselves; links of tracepoints cannot be detached. In the node's network
// namespace.
bool NodeCapture::isDetached(const std::string& path, int fd) const {
  std::string directory = parentOf(path), name = nameOf(path);
  if (directory == map_directory_) return false;
  if (isClassicGuardPin(name)) return !isClassicGuardAttached(name, fd);
  bpf_link_info info{};
  unsigned size = sizeof(info);
  if (bpf_obj_get_info_by_fd(fd, &info, &size) || info.type == BPF_LINK_TYPE_RAW_TRACEPOINT) return false;
  return !linkTarget(fd);
}

Repair NodeCapture::repair() {
  Repair result;
  bool gone = std::any_of(kept_.begin(), kept_.end(), [](const auto& each) { return !exists(each.first); });
  if (gone) {
    lockAgain();
    for (const char* name : {"", "/maps", "/links", "/pods"}) makeDirectory(root_ + name);
    for (const auto& [path, fd] : kept_) {
      if (exists(path)) continue;
      makeDirectory(parentOf(path));
      pin(fd.get(), path);
      result.repinned++;
    }
  }
  unsigned of_node = 0;
  onNode([&] {
    for (const auto& [path, fd] : kept_) {
      if (!isDetached(path, fd.get())) continue;
      std::string directory = parentOf(path);
      if (directory == root_ + "/links")
        of_node++;
      else if (result.pods.empty() || result.pods.back() != nameOf(directory))
        result.pods.push_back(nameOf(directory));
    }
  });
  if (of_node) {
    CapturePrograms loaded = loadCapture(map_directory_);
    attachAll(hold_options_, loaded);
    keep(root_ + "/links");
    result.reattached = of_node;
  }
  return result;
}

unsigned NodeCapture::removeStrays() const {
  // All guards ask it whether their pod is captured.
  Fd map = openPin(map_directory_ + "/ebb_pods");
  PinnedGuards own{map.get(), {}};
  for (const auto& [uid, pod] : pods_) addPinnedGuards(podDirectory(uid), own);
  unsigned removed = 0;
  onNode([&] { removed = removeStrayGuards(map ? &own : nullptr); });
  return removed;
}

}  // namespace ebbtide::capture
