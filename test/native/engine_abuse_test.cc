// Peers that mean harm: floods, half-open connections, more than their share. The engine stays up, bounded,
// and serves the others.
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "lab.h"
#include "peer.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

const std::string kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string("\0\0\0\4\0\0\0\0\0", 9);

class EngineAbuse : public testing::Test {
 protected:
  void SetUp() override { signal(SIGPIPE, SIG_IGN); }
  std::shared_ptr<AccessRecord> inboundWith(Reason reason) {
    return lab.two_events.wait(
        [reason](const AccessRecord& each) { return each.inbound && each.reason == reason; });
  }
  Lab lab;
};

TEST_F(EngineAbuse, AResetWhileThePodHasNoCertificateIsHarmless) {
  lab.two->removeCertificate(Lab::kServerUri);
  lab.two->connections();
  Tcp tcp = rawTunnel(lab);
  ASSERT_TRUE(tcp.send("bytes before the server reads"));
  std::this_thread::sleep_for(200ms);
  tcp.abort();
  ASSERT_TRUE(inboundWith(Reason::kTlsHandshakeFailed));
  lab.two->setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  EXPECT_TRUE(client.accepted);
}

TEST_F(EngineAbuse, AFloodOfKeyUpdatesIsClosed) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write(kPreface));
  // Each is sent as a record of its own, and nothing is read.
  for (int i = 0; i < 200 && client.newKeys(true) && client.handshake(); i++) {
  }
  for (int i = 0; i < 50 && lab.two->stats().hbone_connections > 0; i++) std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
}

}  // namespace
}  // namespace ebbtide::test
