// What the engine refuses of a peer: TLS without or with the wrong identity, other protocols, junk, floods.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "lab.h"
#include "peer.h"
#include "socket.h"

namespace ebbtide::test {
namespace {

class EnginePeer : public testing::Test {
 protected:
  void SetUp() override { signal(SIGPIPE, SIG_IGN); }  // OpenSSL writes to sockets that the engine closed
  // The connection is refused and recorded with `reason` on the server's node.
  void refused(const TlsClient::Options& options, Reason reason) {
    {
      TlsClient client(lab, options);
      EXPECT_FALSE(client.accepted);
    }
    auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
    ASSERT_TRUE(record);
    EXPECT_EQ(record->reason, reason) << record->detail;
    EXPECT_FALSE(record->established);
    EXPECT_FALSE(record->detail.empty());
    EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
    EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
  }
  Lab lab;
};

TEST_F(EnginePeer, AcceptsAMeshCertificate) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  EXPECT_TRUE(client.accepted);
}

// The record layer is the engine's own after the handshake: an OpenSSL peer must follow it through new keys.
TEST_F(EnginePeer, FollowsNewKeysAndAnswersWithItsOwn) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string("\0\0\0\4\0\0\0\0\0", 9)));
  for (int i = 0; i < 5; i++) {
    ASSERT_TRUE(client.newKeys(i % 2 == 0));
    std::string payload = "payload" + std::to_string(i);
    ASSERT_TRUE(client.write(std::string("\0\0\x8\6\0\0\0\0\0", 9) + payload));
    EXPECT_TRUE(client.readUntil(payload)) << i;
  }
}

TEST_F(EnginePeer, RefusesNoCertificate) {
  refused({}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesAnotherTrustDomain) {
  auto other = lab.authority.issue("spiffe://other.domain/ns/default/sa/client");
  refused({&other}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesAnExpiredCertificate) {
  Authority::Request request{Lab::kClientUri, -7200, -3600, true};
  auto expired = lab.authority.issue(request);
  refused({&expired}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesACertificateOfTheFuture) {
  Authority::Request request{Lab::kClientUri, 3600, 7200, true};
  auto early = lab.authority.issue(request);
  refused({&early}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesAnotherAuthority) {
  Authority stranger("stranger");
  auto foreign = stranger.issue(Lab::kClientUri);
  refused({&foreign}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesACertificateWithoutIdentity) {
  auto nobody = lab.authority.issue("");
  refused({&nobody}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesAUriThatIsNotAMeshIdentity) {
  auto odd = lab.authority.issue("https://cluster.local/ns/default/sa/client");
  refused({&odd}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesACertificateNotMadeForClients) {
  Authority::Request request{Lab::kClientUri, -300, 3600, false};
  auto server_only = lab.authority.issue(request);
  refused({&server_only}, Reason::kPeerUntrusted);
}

TEST_F(EnginePeer, RefusesTls12) {
  auto good = lab.authority.issue(Lab::kClientUri);
  refused({&good, TLS1_2_VERSION}, Reason::kTlsHandshakeFailed);
}

TEST_F(EnginePeer, RefusesNoAlpn) {
  auto good = lab.authority.issue(Lab::kClientUri);
  refused({&good, TLS1_3_VERSION, nullptr}, Reason::kH2HandshakeFailed);
}

TEST_F(EnginePeer, RefusesAnotherAlpn) {
  auto good = lab.authority.issue(Lab::kClientUri);
  refused({&good, TLS1_3_VERSION, "http/1.1"}, Reason::kTlsHandshakeFailed);
}

TEST_F(EnginePeer, JunkInsteadOfTlsIsClosed) {
  for (size_t size : {1u, 5u, 300u, 70'000u}) {
    Tcp tcp = rawTunnel(lab);
    std::string junk(size, '\0');
    for (size_t i = 0; i < size; i++) junk[i] = static_cast<char>(i * 131 + size);
    tcp.send(junk);
    tcp.finish();
    tcp.receiveAll();
    EXPECT_NE(errno, EAGAIN);
  }
  EXPECT_TRUE(lab.two_events.wait(
      [](const AccessRecord& each) { return each.reason == Reason::kTlsHandshakeFailed; }));
}

TEST_F(EnginePeer, JunkInsteadOfHttp2IsClosed) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  EXPECT_TRUE(client.write(std::string(5000, 'j')));
  EXPECT_TRUE(client.closedByServer());
}

TEST_F(EnginePeer, AFloodOfPingsIsClosed) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  std::string flood = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string("\0\0\0\4\0\0\0\0\0", 9);
  for (int i = 0; i < 20'000; i++) flood += std::string("\0\0\x8\6\0\0\0\0\0", 9) + "12345678";
  client.write(flood);
  EXPECT_TRUE(client.closedByServer());
}

TEST_F(EnginePeer, ASilentPeerIsClosedAfterTheHandshakeTime) {
  Lab quick([](EngineConfig& config) { config.tls_timeout = std::chrono::milliseconds(300); });
  Tcp tcp = rawTunnel(quick);
  EXPECT_EQ(tcp.receiveAll(), "");
  auto record = quick.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kTlsHandshakeTimeout);
}

// The other direction: the server is not who the control plane says.
TEST_F(EnginePeer, TheClientRefusesAServerOfAnotherIdentity) {
  lab.two->setCertificate(Lab::kServerUri,
                          lab.authority.issue("spiffe://cluster.local/ns/default/sa/impostor"));
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(near.isReset());
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kPeerIdentityMismatch);
  EXPECT_NE(record->detail.find("impostor"), std::string::npos);
}

TEST_F(EnginePeer, TheClientRefusesAServerOfAnotherAuthority) {
  Authority stranger("stranger");
  lab.two->setCertificate(Lab::kServerUri, stranger.issue(Lab::kServerUri));
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(near.isReset());
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kTlsHandshakeFailed) << record->detail;
}

}  // namespace
}  // namespace ebbtide::test
