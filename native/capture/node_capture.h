// Capture of one node: the cgroup programs and, for each pod, its map entries, its sk_lookup link and its
// guard. Everything that matters lives in the kernel under pins; this object can vanish at any moment and
// another adopts. All functions are called on one thread.
#pragma once

#include <capture.h>
#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "address.h"
#include "fd.h"
#include "guard.h"
#include "hold.h"
#include "programs.h"

namespace ebbtide::capture {

struct PodSpec {
  std::string uid;
  int netns_fd = -1;  // borrowed
  std::vector<Address> addresses;
  bool bypass_inbound = false;
};

struct KnownPod {
  std::string uid;
  uint64_t cookie = 0;
  bool captured = false;
  std::vector<Address> addresses;
};

struct PodStatus {
  std::string uid;
  uint64_t cookie = 0;
  bool outbound = false, inbound = false;
  std::string guard;
  unsigned outbound_listeners = 0, hbone_listeners = 0, plaintext_listeners = 0;
  uint64_t captured_connections = 0, steered_connections = 0, refused_connections = 0, guard_drops = 0;
  uint64_t probe_connections = 0;
  uint64_t last_capture_ns = 0;
  uint32_t flows = 0;
  unsigned inherited_connections = 0;
};

// What was pinned when a capture was opened.
enum class Origin { kNothing, kBootGuard, kAgent };

// What a pod's interfaces carried until it was captured: all protocols, and nothing of it by the mesh.
struct BeforeCapture {
  uint64_t sent_bytes = 0, received_bytes = 0;
  size_t inherited_connections = 0;
};

// What was found missing in the kernel, and mended.
struct Repair {
  unsigned repinned = 0;          // pins that were gone from the bpffs; what they held was never gone
  unsigned reattached = 0;        // programs of the node that somebody had detached
  std::vector<std::string> pods;  // whose own programs are detached: to be activated again
};

class NodeCapture {
 public:
  // Loads, pins and attaches; adopts and updates what an earlier process pinned in the same place.
  // `host_netns`: path of the node's network namespace; empty for that of this process.
  NodeCapture(std::string cgroup, std::string pin_directory, GuardKind guard_kind,
              const std::string& host_netns, const std::optional<HoldOptions>& hold);
  // The same before any agent runs: what is pinned stays marked as the boot guard's until an agent opens it.
  // Throws AgentPinned, and changes nothing, where an agent's pins are.
  static void guardBoot(const std::string& cgroup, const std::string& pin_directory,
                        const std::string& host_netns, const HoldOptions& hold);

  void trustProxy(pid_t pid);
  void distrustProxy(pid_t pid);
  void trustProber(pid_t pid);
  void distrustProber(pid_t pid);
  void prepare(const PodSpec& pod);
  // What the pod did before; empty where it was captured already.
  std::optional<BeforeCapture> activate(const PodSpec& pod);
  // New connections are the pod's own from here, but for HBONE to it; the proxy finishes what it has begun,
  // until release.
  void drain(const std::string& uid);
  void release(const std::string& uid);
  const std::vector<KnownPod>& adopted() const { return adopted_; }
  std::vector<PodStatus> status();
  Hold& hold() { return *hold_; }
  Origin origin() const { return origin_; }
  // Pins are made again that somebody removed, from descriptors that this process holds: without them the
  // kernel would have detached everything with the last pin. Throws CaptureError, and PinsLocked where
  // another agent came meanwhile.
  Repair repair();
  // Guards that an agent before this one left, whose pins somebody removed; to be called when the pods that
  // are wanted have guards of their own again. Returns how many there were.
  unsigned removeStrays() const;
  // Takes everything out of the kernel.
  void removeAll();

 private:
  static constexpr const char* kNoGuard = "not attached: the pod is not captured";

  struct Pod {
    uint64_t cookie = 0;
    std::vector<Address> addresses;
    std::string guard = kNoGuard;
    Fd netns;  // only while inherited connections are open, to see them end
    std::vector<ebb_tuple> inherited;
  };

  enum class Opener { kAgent, kBootGuard };

  NodeCapture(std::string cgroup, std::string pin_directory, GuardKind guard_kind,
              const std::string& host_netns, const std::optional<HoldOptions>& hold, Opener opener);

  void attachCgroupPrograms(const std::vector<CgroupProgram>& programs);
  void forgetDeadProcesses();
  void refuseOtherVersions();
  void replaceOtherGuards();
  void attachAll(const std::optional<HoldOptions>& hold, CapturePrograms& loaded);
  void keep(const std::string& directory);
  void letGo(const std::string& directory);
  void lockAgain();
  bool isDetached(const std::string& path, int fd) const;
  void releasePod(const std::string& uid);
  void adopt();
  void forgetUnknown();
  void adoptPod(const std::string& uid, Pod& pod);
  void collectInherited(std::map<uint64_t, std::vector<ebb_tuple>>& by_cookie);
  void writeAddresses(Pod& pod, const std::vector<Address>& addresses);
  void attachSteer(const PodSpec& spec, const Pod& pod);
  void publishInherited(const PodSpec& spec, Pod& pod);
  void forgetInherited(const ebb_tuple& tuple);
  void pruneInherited(Pod& pod);
  void unguard(const std::string& uid, Pod& pod);
  void guardPod(const PodSpec& spec, Pod& pod, BeforeCapture& before);
  // In the node's network namespace, where interfaces have the numbers by which guards know them.
  void onNode(const std::function<void()>& work) const;
  unsigned guardsOf(const std::string& uid) const;
  std::string podDirectory(const std::string& uid) const { return root_ + "/pods/" + uid; }
  unsigned countListeners(uint64_t cookie, uint32_t role) const;

  std::string cgroup_, pin_directory_, root_, map_directory_;
  GuardKind guard_kind_;
  Fd lock_, cgroup_fd_, host_netns_;
  bool on_node_ = true;  // whether this process is in the node's network namespace itself
  Origin origin_ = Origin::kNothing;
  std::vector<std::string> other_guards_;  // directories of boot guards of other versions
  Maps maps_;
  std::unique_ptr<Hold> hold_;
  std::optional<HoldOptions> hold_options_;
  std::map<std::string, Fd> kept_;  // by path of the pin
  std::map<std::string, Pod> pods_;
  std::vector<KnownPod> adopted_;
};

// Whether the text can name a pod's pins (a bpffs refuses dots).
bool isValidUid(const std::string& uid);

}  // namespace ebbtide::capture
