// Reads /proc/PID/stat, /proc/PID/cgroup and mountinfo.
#include "process.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>

#include <exception>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

#include "error.h"
#include "fd.h"

namespace ebbtide::capture {

namespace {

// PROC_CGROUP_INIT_INO and PROC_PID_INIT_INO of the kernel's include/linux/proc_ns.h.
constexpr ino_t kInitialCgroupNamespace = 0xEFFFFFFB;
constexpr ino_t kInitialPidNamespace = 0xEFFFFFFC;

std::string readFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// The machine's own cgroup namespace, by any process that is in it: process 1 may be out of reach.
Fd machineCgroupNamespace() {
  std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir("/proc"), closedir);
  while (dirent* entry = directory ? readdir(directory.get()) : nullptr) {
    if (entry->d_name[0] < '1' || entry->d_name[0] > '9') continue;
    Fd fd(open(("/proc/" + std::string(entry->d_name) + "/ns/cgroup").c_str(), O_RDONLY | O_CLOEXEC));
    struct stat info;
    if (fd && !fstat(fd.get(), &info) && info.st_ino == kInitialCgroupNamespace) return fd;
  }
  throw CaptureError(
      "finding a process in the machine's cgroup namespace", ESRCH,
      "hostPID and CAP_SYS_PTRACE are needed where the agent has a cgroup namespace of its own");
}

// Runs the function where /proc shows cgroups as the machine has them. In a container with a cgroup namespace
// of its own, which is usual with cgroup v2, all paths are relative to the container's cgroup: "/../proxy"
// for its neighbour, and the root of a mount of the whole hierarchy is "/../..". On a thread of its own,
// because setns is per thread.
void inMachineCgroups(const std::function<void()>& function) {
  struct stat own;
  if (stat("/proc/self/ns/cgroup", &own) || own.st_ino == kInitialCgroupNamespace) return function();
  Fd machine = machineCgroupNamespace();
  std::exception_ptr failure;
  try {
    std::thread([&] {
      try {
        if (setns(machine.get(), CLONE_NEWCGROUP))
          throw CaptureError("entering the machine's cgroup namespace", errno, "CAP_SYS_ADMIN is needed");
        function();
      } catch (...) {
        failure = std::current_exception();
      }
    }).join();
  } catch (const std::system_error& error) {
    throw CaptureError("starting a thread to enter the machine's cgroup namespace", error.code().value());
  }
  if (failure) std::rethrow_exception(failure);
}

// The path of the process in cgroup2, as /proc/PID/cgroup has it in its line "0::".
std::string cgroupPath(pid_t pid) {
  std::istringstream lines(readFile("/proc/" + std::to_string(pid) + "/cgroup"));
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with("0::")) return line.substr(3);
  throw CaptureError("finding the cgroup of process " + std::to_string(pid), ESRCH, "it may have ended");
}

// Mount point and root of the cgroup2 mount that the directory is on.
std::pair<std::string, std::string> cgroupMount(const std::string& directory) {
  std::istringstream lines(readFile("/proc/thread-self/mountinfo"));
  std::pair<std::string, std::string> best;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line.substr(0, line.find(" - ")));
    std::string id, parent, device, root, point;
    words >> id >> parent >> device >> root >> point;
    auto type = line.find(" - cgroup2 ");
    bool inside = directory == point || directory.starts_with(point == "/" ? point : point + "/");
    if (type != std::string::npos && inside && point.size() >= best.first.size()) best = {point, root};
  }
  if (best.first.empty())
    throw CaptureError(directory + " is not on a cgroup2 mount", EINVAL,
                       "--cgroup names the root of cgroup2");
  return best;
}

}  // namespace

uint64_t processStart(pid_t pid) {
  std::string text = readFile("/proc/" + std::to_string(pid) + "/stat");
  auto end = text.rfind(')');  // the name before it may hold anything
  if (end == std::string::npos) return 0;
  std::istringstream words(text.substr(end + 1));
  std::string word;
  for (int field = 3; field < 22; field++) words >> word;
  uint64_t start = 0;
  words >> start;
  return start;
}

ProcessIdentity identifyProcess(pid_t pid, const std::string& cgroup_root) {
  struct stat info;
  if (stat("/proc/self/ns/pid", &info) || info.st_ino != kInitialPidNamespace)
    throw CaptureError(
        "trusting process " + std::to_string(pid), EXDEV,
        "the kernel's programs see the initial pid namespace only: run the agent with hostPID");
  ProcessIdentity identity{0, processStart(pid)};
  if (!identity.start_ticks) throw CaptureError("trusting process " + std::to_string(pid), ESRCH);
  std::string point, root, path;
  inMachineCgroups([&] {
    std::tie(point, root) = cgroupMount(cgroup_root);
    path = cgroupPath(pid);
  });
  if (root != "/" && path.starts_with(root)) path = path.substr(root.size());
  if (stat((point + path).c_str(), &info))
    throw CaptureError("finding cgroup " + point + path + " of process " + std::to_string(pid), errno,
                       "the host's cgroup2 must be mounted here");
  identity.cgroup = info.st_ino;
  if (processStart(pid) != identity.start_ticks)
    throw CaptureError("trusting process " + std::to_string(pid), ESRCH, "it ended meanwhile");
  return identity;
}

}  // namespace ebbtide::capture
