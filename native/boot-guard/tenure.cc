// Looks once a second: at the pins, at the pods that the kernel saw appear, at what the kubelet starts.
#include "tenure.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "boot_time.h"
#include "error.h"
#include "node.h"
#include "pins.h"

namespace ebbtide::boot_guard {

using capture::CaptureError;

namespace {

constexpr unsigned kLookSeconds = 1;

// Directories of versions, each with whether the mark is there.
std::vector<std::string> guardsIn(const std::string& pins) {
  std::vector<std::string> result;
  for (const std::string& name : capture::listDirectory(pins))
    if (capture::exists(pins + "/" + name + "/" + capture::kBootGuardMark))
      result.push_back(pins + "/" + name);
  return result;
}

// Static pods come from files of the node, also while there is no API; the UIDs of the others have dashes.
bool isOfApi(const capture::Newcomer& pod) {
  return pod.uid.find('-') != std::string::npos;
}

}  // namespace

bool isGuarding(const std::string& pins) {
  return !guardsIn(pins).empty();
}

bool release(const std::string& pins) {
  if (!isGuarding(pins)) return false;
  capture::Fd lock;
  try {
    lock = capture::lockPins(pins);
  } catch (const capture::PinsLocked&) {
    return false;
  } catch (const CaptureError& error) {
    if (error.number == ENOENT) return false;
    throw;
  }
  // Asked again: only now nobody else can change it.
  std::vector<std::string> guards = guardsIn(pins);
  for (const std::string& directory : guards) capture::removePins(directory);
  rmdir(pins.c_str());  // stays where pins of another version are
  return !guards.empty();
}

bool Expectation::isOver(const std::vector<capture::Newcomer>& newcomers, const std::set<std::string>& agents,
                         uint64_t now_ns) {
  // A directory may be left of a pod of the time before the boot; it is none of now if the kernel did not see
  // it.
  bool agent = std::any_of(newcomers.begin(), newcomers.end(),
                           [&](const capture::Newcomer& each) { return agents.contains(each.uid); });
  bool others = std::any_of(newcomers.begin(), newcomers.end(), isOfApi);
  if (agent || !others)
    since_ns_ = 0;
  else if (!since_ns_)
    since_ns_ = now_ns;
  return since_ns_ && now_ns - since_ns_ >= patience_ns_;
}

bool waitForAgent(const Options& options) {
  Expectation expectation(uint64_t{options.release_after_seconds.value_or(0)} * 1000000000);
  std::string said;
  for (;; sleep(kLookSeconds)) {
    std::vector<std::string> guards = guardsIn(options.pins);
    if (guards.empty()) return false;
    if (!options.release_after_seconds) continue;
    try {
      std::vector<capture::Newcomer> newcomers;
      for (const std::string& directory : guards)
        for (capture::Newcomer& each : capture::newcomersOf(directory)) newcomers.push_back(std::move(each));
      if (expectation.isOver(newcomers, podsOf(options.daemonset, options.pod_logs), capture::bootTime()))
        return release(options.pins);
    } catch (const CaptureError& error) {
      // Nothing is known, so nothing is freed.
      if (said != error.what()) std::fprintf(stderr, "waiting: %s\n", error.what());
      said = error.what();
    }
  }
}

}  // namespace ebbtide::boot_guard
