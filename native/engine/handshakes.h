// Connections to one pod's HBONE port that have not proved who they are, of one worker. Their places are few;
// when they run out the oldest go first, so that a flood costs a real peer a place only if the flood comes
// faster than a handshake takes.
#pragma once

#include <cstdint>
#include <map>

#include "list.h"
#include "model.h"

namespace ebbtide {

class ServerTunnel;

class Handshakes {
 public:
  // One remote address gets a quarter of the places.
  explicit Handshakes(uint32_t places);

  // A member of the two lists.
  struct Place {
    explicit Place(ServerTunnel* tunnel) : by_age(tunnel), by_address(tunnel) {}
    ListHook<ServerTunnel> by_age, by_address;
    IpAddress address;
    bool taken = false;
  };

  // Whom to end before another connection from `address` may begin; null: there is room.
  ServerTunnel* crowded(const IpAddress& address) const;
  void enter(Place& place, const IpAddress& address);
  void leave(Place& place);
  uint32_t count() const { return count_; }

 private:
  struct Remote {
    List<ServerTunnel> tunnels;
    uint32_t count = 0;
  };
  const uint32_t places_, places_an_address_;
  uint32_t count_ = 0;
  List<ServerTunnel> by_age_;
  std::map<IpAddress, Remote> remotes_;
};

}  // namespace ebbtide
