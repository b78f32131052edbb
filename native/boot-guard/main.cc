// ebbtide-boot-guard: holds new pods between the boot of a node and its agent. After a boot nothing of the
// mesh is in the kernel, and the kubelet starts pods before the agent can look after them; they would speak
// in clear. This program needs neither Node nor a library of the host. It loads the agent's own programs and
// pins them where the agent adopts them, set to refuse TCP to and from every new pod about which nothing is
// decided, and ends.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "boot_time.h"
#include "error.h"
#include "node.h"
#include "node_capture.h"
#include "options.h"
#include "pins.h"
#include "tenure.h"

namespace ebbtide::boot_guard {

using capture::CaptureError;

namespace {

enum Exit { kGuarded = 0, kNotGuarded = 1, kUsageWrong = 2, kOtherVersion = 3 };

// Seconds since boot.
double now() {
  return static_cast<double>(capture::bootTime()) / 1e9;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (unsigned char c : text) {
    char escape[8];
    if (c == '"' || c == '\\')
      (result += '\\') += static_cast<char>(c);
    else if (c < 0x20)
      std::snprintf(escape, sizeof(escape), "\\u%04x", c), result += escape;
    else
      result += static_cast<char>(c);
  }
  return result + "\"";
}

// What became of it, for the unit's log and for the agent. The file is replaced as a whole.
int tell(const Options& options, const std::string& state, Exit code, const std::string& message) {
  std::fprintf(stderr, "%s: %s\n", state.c_str(), message.c_str());
  if (options.report.empty()) return code;
  for (size_t slash = options.report.find('/', 1); slash != std::string::npos;
       slash = options.report.find('/', slash + 1))
    mkdir(options.report.substr(0, slash).c_str(), 0755);
  std::string next = options.report + ".next";
  std::ofstream file(next, std::ios::trunc);
  file << "{\"state\":" << quoted(state) << ",\"message\":" << quoted(message)
       << ",\"bootId\":" << quoted(bootId()) << ",\"uptimeSeconds\":" << now()
       << ",\"version\":" << quoted(EBB_PIN_VERSION) << "}\n";
  file.close();
  if (!file || std::rename(next.c_str(), options.report.c_str()))
    std::fprintf(stderr, "the report cannot be written to %s: %s\n", options.report.c_str(),
                 std::strerror(errno));
  return code;
}

const char kLate[] = "failed: not done within --timeout; new pods are not guarded\n";

void onAlarm(int) {
  // Only what may be called here: the process is in the middle of anything.
  [[maybe_unused]] ssize_t written = write(STDERR_FILENO, kLate, sizeof(kLate) - 1);
  _exit(kNotGuarded);
}

// What is half done is marked as the guard's: the next guard finishes it, an agent adopts it.
int guard(const Options& options) {
  double began = now();
  struct sigaction action{};
  action.sa_handler = onAlarm;
  sigaction(SIGALRM, &action, nullptr);
  alarm(options.timeout_seconds);
  try {
    std::string cgroup = options.cgroup.empty() ? findCgroupRoot() : options.cgroup;
    capture::HoldOptions hold;
    hold.refuse = true;
    hold.directory = options.pod_cgroup;
    capture::NodeCapture::guardBoot(cgroup, options.pins, options.host_netns, hold);
    char took[64];
    std::snprintf(took, sizeof(took), "%.0f ms, %.1f s after boot", (now() - began) * 1000, now());
    return tell(options, "guarded", kGuarded,
                "new pods have no TCP until an agent has decided about them (" + std::string(took) +
                    "; cgroup " + cgroup + ", pins " + options.pins + ")");
  } catch (const capture::PinsLocked&) {
    return tell(options, "agent", kGuarded, "an agent has this node; nothing was changed");
  } catch (const capture::AgentPinned& error) {
    return tell(options, "agent", kGuarded, std::string(error.what()) + "; nothing was changed");
  } catch (const capture::OtherVersionPinned& error) {
    return tell(options, "other version", kOtherVersion, error.what());
  } catch (const CaptureError& error) {
    if (!error.log.empty()) std::fprintf(stderr, "%s\n", error.log.c_str());
    try {
      release(options.pins);
    } catch (const CaptureError& second) {
      std::fprintf(stderr, "and what was made cannot be removed: %s\n", second.what());
    }
    return tell(options, "failed", kNotGuarded, std::string(error.what()) + "; new pods are not guarded");
  }
}

int wait(const Options& options) {
  if (!waitForAgent(options)) {
    std::fprintf(stderr, "over: the guard is not, or no longer, in the kernel: an agent has taken over\n");
    return kGuarded;
  }
  for (const std::string& file : options.disable)
    if (unlink(file.c_str()) && errno != ENOENT)
      std::fprintf(stderr, "%s cannot be removed: %s\n", file.c_str(), std::strerror(errno));
  return tell(options, "released", kGuarded,
              "the kubelet starts other pods and none of DaemonSet " + options.daemonset + " for " +
                  std::to_string(*options.release_after_seconds) +
                  " s: the mesh has left this node, its pods have their network");
}

int releaseNow(const Options& options) {
  if (release(options.pins))
    return tell(options, "released", kGuarded, "as was asked; pods have their network");
  std::fprintf(stderr, "nothing to release: no guard is there, or an agent has taken over\n");
  return kGuarded;
}

}  // namespace

int run(const Options& options) {
  switch (options.command) {
    case Command::kGuard:
      return guard(options);
    case Command::kWait:
      return wait(options);
    case Command::kRelease:
      return releaseNow(options);
  }
  return kUsageWrong;
}

}  // namespace ebbtide::boot_guard

int main(int argc, char** argv) {
  using namespace ebbtide::boot_guard;
  if (argc == 2 && std::string(argv[1]) == "--help") {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    return run(readOptions(argc, argv));
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s\nebbtide-boot-guard --help tells the flags\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
}
