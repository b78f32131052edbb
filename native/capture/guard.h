// The guard: a pod's tc program on the host side of its veths, by tcx link or, on kernels before 6.6, by
// clsact.
#pragma once

#include <set>
#include <string>

namespace ebbtide::capture {

enum class GuardKind { kAutomatic, kClassic };

// Attaches to the interface's ingress in the caller's network namespace and pins below `directory`, or
// updates what is pinned.
void attachGuard(const std::string& directory, int interface_index, int program_fd, GuardKind kind);
// Detaches all guards pinned in the directory.
void removeGuards(const std::string& directory);
// Number of guards pinned in the directory that are attached to a living interface.
unsigned countGuards(const std::string& directory);
// Puts another program into all guards pinned in the directory.
void updateGuards(const std::string& directory, int program_fd);
// The classic guards of a capture.
struct PinnedGuards {
  // A map that all of them use.
  int map_fd;
  std::set<int> interfaces;
};

// Adds those that are pinned in the directory.
void addPinnedGuards(const std::string& directory, PinnedGuards& pinned);
// Takes down filters of guards in the caller's network namespace that are of no capture any more: nothing
// rewrites connects by their maps, so they would stop their pods' TCP for as long as the interface lives.
// Of the caller's own capture, if it has one, those that are pinned nowhere: an agent was killed between two
// steps. A tcx link ends with its pin. Returns how many there were.
unsigned removeStrayGuards(const PinnedGuards* own);

bool isGuardPin(const std::string& name);
bool isClassicGuardPin(const std::string& name);
// Whether the program that is pinned under this name, or another of its capture, is a filter of its
// interface.
bool isClassicGuardAttached(const std::string& name, int program_fd);
// Takes the tc filter down that the pinned program belongs to; the pin itself stays.
void removeClassicGuard(const std::string& path, const std::string& name);

// Attaches a program to an interface of the caller's network namespace in one of the two ways, and takes it
// away again; what the kernel refuses is thrown. By clsact the qdisc stays behind.
void tryTcx(int program_fd, int interface_index);
void tryClassic(int program_fd, int interface_index);

}  // namespace ebbtide::capture
