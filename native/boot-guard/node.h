// What the boot guard finds on the node by itself: where cgroup2 is, which boot this is, whose pods the
// kubelet starts.
#pragma once

#include <set>
#include <string>

namespace ebbtide::boot_guard {

// Mount point of the root of cgroup2, also on a host with cgroup v1 beside it. Throws CaptureError where
// there is none.
std::string findCgroupRoot();

// Text of /proc/sys/kernel/random/boot_id, empty where it cannot be read.
std::string bootId();

// UIDs of the pods of a DaemonSet (NAMESPACE/NAME) that the kubelet starts or has started here, by the
// directories it makes for their logs before anything else: NAMESPACE_NAME-xxxxx_UID. Throws CaptureError
// where the directory cannot be read.
std::set<std::string> podsOf(const std::string& daemonset, const std::string& pod_logs);

}  // namespace ebbtide::boot_guard
