// Places of unfinished handshakes.
#include "handshakes.h"

#include <algorithm>

namespace ebbtide {

Handshakes::Handshakes(uint32_t places)
    : places_(std::max(places, 4u)), places_an_address_(std::max(places / 4, 2u)) {}

ServerTunnel* Handshakes::crowded(const IpAddress& address) const {
  auto found = remotes_.find(address);
  if (found != remotes_.end() && found->second.count >= places_an_address_)
    return found->second.tunnels.front();
  return count_ >= places_ ? by_age_.front() : nullptr;
}

void Handshakes::enter(Place& place, const IpAddress& address) {
  Remote& remote = remotes_[address];
  place.address = address;
  place.taken = true;
  remote.tunnels.pushBack(place.by_address);
  remote.count++;
  by_age_.pushBack(place.by_age);
  count_++;
}

void Handshakes::leave(Place& place) {
  if (!place.taken) return;
  place.taken = false;
  place.by_age.unlink();
  place.by_address.unlink();
  count_--;
  auto found = remotes_.find(place.address);
  if (--found->second.count == 0) remotes_.erase(found);
}

}  // namespace ebbtide
