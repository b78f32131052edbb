// getopt_long, and numbers that are checked.
#include "options.h"

#include <getopt.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace ebbtide::boot_guard {

const char* const kUsage =
    R"(usage: ebbtide-boot-guard guard|wait|release --node NAME [options]

  guard    after a boot, before any pod: new pods have no TCP until this node's agent has decided about them. Ends at once.
  wait     until an agent has taken over; frees the node when it turns out that none will come, and ends.
  release  frees the node now, unless an agent has taken over.

  --node NAME            this node, as in spec.nodeName of its pods
  --bpffs DIR            where programs and maps are pinned (default /sys/fs/bpf); mounted there if none is
  --pins DIR             instead of both: the agent's pin directory (default BPFFS/ebbtide-NAME, dots as underscores)
  --cgroup DIR           directory of cgroup2 that is guarded (default: the root of cgroup2, found in /proc/self/mountinfo)
  --pod-cgroup DIR       directory of cgroup2 below which this node's pods are (default: anywhere)
  --host-netns PATH      the node's network namespace, whose pods are never held (default: that of this process)
  --timeout SECONDS      guard: fail rather than take longer (default 20)
  --report FILE          write what became of it there, as JSON, for the agent
  --daemonset NS/NAME    wait: the agent's DaemonSet (default ebbtide-system/ebbtide-node)
  --release-after SECONDS|never
                         wait: how long the kubelet must have been starting other pods, and none of the DaemonSet, before the
                         node is freed (default 600)
  --pod-logs DIR         wait: where the kubelet keeps logs of pods, by which it is known whose pods it starts (default
                         /var/log/pods)
  --disable FILE         wait: remove this file when the node was freed, so that the next boot is not guarded; may be repeated

Exit code: 0 new pods are guarded, by this or by an agent that is there; 1 they are not: the message says why; 2 wrong usage;
3 pins of another version are there, nothing was changed.
)";

namespace {

enum Flag {
  kNode = 256,
  kBpffs,
  kPins,
  kCgroup,
  kPodCgroup,
  kHostNetns,
  kTimeout,
  kReport,
  kDaemonset,
  kReleaseAfter,
  kPodLogs,
  kDisable,
};

constexpr option kFlags[] = {
    {"node", required_argument, nullptr, kNode},
    {"bpffs", required_argument, nullptr, kBpffs},
    {"pins", required_argument, nullptr, kPins},
    {"cgroup", required_argument, nullptr, kCgroup},
    {"pod-cgroup", required_argument, nullptr, kPodCgroup},
    {"host-netns", required_argument, nullptr, kHostNetns},
    {"timeout", required_argument, nullptr, kTimeout},
    {"report", required_argument, nullptr, kReport},
    {"daemonset", required_argument, nullptr, kDaemonset},
    {"release-after", required_argument, nullptr, kReleaseAfter},
    {"pod-logs", required_argument, nullptr, kPodLogs},
    {"disable", required_argument, nullptr, kDisable},
    {nullptr, 0, nullptr, 0},
};

unsigned seconds(const char* flag, const std::string& text, unsigned least) {
  bool digits = !text.empty() && text.size() <= 6 &&
                std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  unsigned value = digits ? static_cast<unsigned>(std::atoi(text.c_str())) : 0;
  if (!digits || value < least)
    throw UsageError(std::string(flag) + " is '" + text + "'; give whole seconds, at least " +
                     std::to_string(least));
  return value;
}

// As src/agent/settings.ts names it: a bpffs refuses dots.
std::string pinsOf(const std::string& bpffs, std::string node) {
  bool valid =
      !node.empty() && node.size() <= 253 && std::all_of(node.begin(), node.end(), [](unsigned char c) {
        return std::islower(c) || std::isdigit(c) || c == '-' || c == '.';
      });
  if (!valid) throw UsageError("--node is '" + node + "', which is no name of a Node");
  std::replace(node.begin(), node.end(), '.', '_');
  return bpffs + "/ebbtide-" + node;
}

Command commandOf(const std::string& name) {
  if (name == "guard") return Command::kGuard;
  if (name == "wait") return Command::kWait;
  if (name == "release") return Command::kRelease;
  throw UsageError("'" + name + "' is no command; there are guard, wait and release");
}

}  // namespace

Options readOptions(int argc, char** argv) {
  Options options;
  std::string node, bpffs = "/sys/fs/bpf";
  opterr = 0;
  for (int flag; (flag = getopt_long(argc, argv, "", kFlags, nullptr)) != -1;) {
    std::string value = optarg ? optarg : "";
    switch (flag) {
      case kNode:
        node = value;
        break;
      case kBpffs:
        bpffs = value;
        break;
      case kPins:
        options.pins = value;
        break;
      case kCgroup:
        options.cgroup = value;
        break;
      case kPodCgroup:
        options.pod_cgroup = value;
        break;
      case kHostNetns:
        options.host_netns = value;
        break;
      case kTimeout:
        options.timeout_seconds = seconds("--timeout", value, 1);
        break;
      case kReport:
        options.report = value;
        break;
      case kDaemonset:
        options.daemonset = value;
        break;
      case kReleaseAfter:
        options.release_after_seconds.reset();
        if (value != "never") options.release_after_seconds = seconds("--release-after", value, 0);
        break;
      case kPodLogs:
        options.pod_logs = value;
        break;
      case kDisable:
        options.disable.push_back(value);
        break;
      default:
        throw UsageError(std::string("'") + argv[optind - 1] + "' is no flag, or lacks its value");
    }
  }
  if (optind + 1 != argc) throw UsageError("give one command: guard, wait or release");
  options.command = commandOf(argv[optind]);
  if (options.pins.empty()) options.pins = pinsOf(bpffs, node);
  if (auto slash = options.daemonset.find('/');
      slash == 0 || slash == std::string::npos || slash + 1 == options.daemonset.size())
    throw UsageError("--daemonset is '" + options.daemonset + "'; give NAMESPACE/NAME");
  return options;
}

}  // namespace ebbtide::boot_guard
