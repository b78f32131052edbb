// The bpffs: mounted where it is missing, directories made and removed, links pinned, adopted and taken down.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.h"

namespace ebbtide::capture {

// Directory below a version's pins for as long as they are a boot guard's and no agent has opened them. Never
// to be renamed: versions know each other's guard by it.
inline constexpr const char* kBootGuardMark = "boot-guard";

// Makes the directory, and mounts a bpffs at its parent if no part of its path is one.
void makePinDirectory(const std::string& path);
void makeDirectory(const std::string& path);
std::vector<std::string> listDirectory(const std::string& path);  // empty when it does not exist
bool exists(const std::string& path);
// Whoever holds this descriptor is alone with the pins. Throws PinsLocked where another process is.
Fd lockPins(const std::string& path);

// Descriptor of a pinned link or program, empty when nothing is pinned there.
Fd openPin(const std::string& path);
void pin(int fd, const std::string& path);
void unpin(const std::string& path);  // no error when it is not there

// What a link is attached to: cgroup id, inode of a netns or index of an interface by its type; 0 when that
// is gone.
uint64_t linkTarget(int link_fd);
void updateLink(int link_fd, int program_fd, const std::string& path);
// Detaches a pinned link and removes the pin; no error when either is gone.
void removeLink(const std::string& path);

// Detaches and unpins everything below and removes the directory. Returns how many pins there were.
unsigned removePins(const std::string& directory);

}  // namespace ebbtide::capture
