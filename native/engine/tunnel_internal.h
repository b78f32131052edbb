// What tunnel.cc and tunnel_h2.cc share and nobody else sees.
#pragma once

#include "tunnel.h"

namespace ebbtide {

struct EngineConfig;

// Small frames of one turn, joined into one TLS record.
struct Tunnel::Stage {
  size_t size = 0;
  uint8_t data[kRecordBytes + 1];  // and room for the record's content type
};

// An nghttp2 session with the mesh's settings and limits, its SETTINGS submitted. Returns an nghttp2 error
// code.
int createSession(nghttp2_session** session, bool server, const EngineConfig& config, Tunnel* tunnel);

}  // namespace ebbtide
