// Fuzzes an authenticated peer's HTTP/2 against the running engine: real handshake, then the input as what
// follows the preface. Needs root for namespaces. The pod's port 8080 is served, so that CONNECT can succeed.
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "lab.h"
#include "peer.h"

using namespace ebbtide;
using namespace ebbtide::test;

namespace {

struct World {
  World() : certificate(lab.authority.issue(Lab::kClientUri)), listener(listenOn(lab.server, 8080)) {
    signal(SIGPIPE, SIG_IGN);
    std::thread([this] {
      for (;;) {
        Tcp accepted = acceptFrom(listener);
        if (accepted) accepted.send("hello");
      }
    }).detach();
  }
  Lab lab;
  CertificateBundle certificate;
  Tcp listener;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static World* const world = new World;  // lives as long as the process: its threads do
  {
    TlsClient client(world->lab, {&world->certificate});
    if (!client.accepted) std::abort();
    std::string bytes = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string("\0\0\0\4\0\0\0\0\0", 9);
    client.write(bytes.append(reinterpret_cast<const char*>(data), size));
  }
  // Everything that the peer did goes with it.
  for (int i = 0; world->lab.two->stats().hbone_connections + world->lab.two->stats().open_connections > 0;
       i++) {
    if (i > 50'000) std::abort();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  if (world->lab.two->stats().buffered_bytes != 0) std::abort();
  return 0;
}
