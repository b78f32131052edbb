// What the engine refuses of a peer: TLS without or with the wrong identity, other protocols, junk, floods.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <thread>

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
    said = record->detail;
    // The same in the metric's labels.
    bool counted = false;
    for (auto& sample : lab.two->traffic()) {
      bool flagged = std::find(sample.labels.begin(), sample.labels.end(), reasonResponseFlag(reason)) !=
                     sample.labels.end();
      if (sample.failed == 1 && sample.opened == 0 && flagged) counted = true;
    }
    EXPECT_TRUE(counted);
    EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
    EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
  }
  Lab lab;
  std::string said;  // detail of the refusal
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

TEST_F(EnginePeer, RefusesAClientWhoseRootExpired) {
  Authority old("old root", -60);
  lab.two->removeCertificate(Lab::kServerUri);
  auto trusting = lab.authority.issue(Lab::kServerUri);
  trusting.roots_pem += old.pem();  // its root is known, and is out of date
  lab.two->setCertificate(Lab::kServerUri, trusting);
  auto leaf = old.issue(Lab::kClientUri);
  refused({&leaf}, Reason::kPeerUntrusted);
  EXPECT_NE(said.find("expired"), std::string::npos) << said;
}

TEST_F(EnginePeer, AcceptsAChainAndRefusesOneThatIsTooDeep) {
  Authority last = lab.authority;
  for (int i = 0; i < 8; i++) last = last.intermediate("intermediate " + std::to_string(i));
  auto within = last.issue(Lab::kClientUri);
  EXPECT_TRUE(TlsClient(lab, {&within}).accepted);
  EXPECT_EQ(lab.two->stats().handshake_failures, 0u);
  auto beyond = last.intermediate("one too many").issue(Lab::kClientUri);
  for (int i = 0; i < 50 && lab.two->stats().hbone_connections > 0; i++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  refused({&beyond}, Reason::kPeerUntrusted);
  EXPECT_NE(said.find("too long"), std::string::npos) << said;
}

// As rustls does in ztunnel: an extension that is there must name the purpose, none at all is any purpose.
TEST_F(EnginePeer, TakesACertificateWithoutExtendedKeyUsage) {
  Authority::Request request{Lab::kClientUri};
  request.usage = "none";
  auto any = lab.authority.issue(request);
  EXPECT_TRUE(TlsClient(lab, {&any}).accepted);
}

TEST_F(EnginePeer, RefusesACertificateForAnotherPurpose) {
  Authority::Request request{Lab::kClientUri};
  request.usage = "codeSigning";
  auto other = lab.authority.issue(request);
  refused({&other}, Reason::kPeerUntrusted);
  EXPECT_NE(said.find("purpose"), std::string::npos) << said;
}

TEST_F(EnginePeer, TheFirstUriThatParsesIsTheIdentity) {
  Authority::Request request{"https://not.an.identity/"};
  request.more_uris =
      std::string(",URI:") + Lab::kClientUri + ",URI:spiffe://cluster.local/ns/default/sa/second";
  auto several = lab.authority.issue(request);
  // Refused by policy, whose record names who it was.
  Policy deny;
  deny.name = "deny";
  deny.ns = "default";
  deny.action = Policy::Action::kDeny;
  PolicyMatch match;
  match.principals.any_of = {{StringMatch::Kind::kExact, "cluster.local/ns/default/sa/client"}};
  deny.rules = {{{match}}};
  StateDelta delta;
  delta.policies = {deny};
  Workload changed = lab.workload("server", Lab::kServerIp, "two");
  changed.authorization_policies = {deny.key()};
  delta.workloads = {changed};
  lab.apply(delta);
  TlsClient client(lab, {&several});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write(kPreface + connectFrame(1, "10.77.0.2:8080")));
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kPolicyDenied) << record->detail;
  EXPECT_EQ(record->source_identity, Lab::kClientUri);
}

// Not the second, be it ever so welcome.
TEST_F(EnginePeer, AFirstIdentityOfAnotherTrustDomainIsNotMadeGoodByASecond) {
  Authority::Request request{"spiffe://other.domain/ns/default/sa/client"};
  request.more_uris = std::string(",URI:") + Lab::kClientUri;
  auto both = lab.authority.issue(request);
  refused({&both}, Reason::kPeerUntrusted);
  EXPECT_NE(said.find("other.domain"), std::string::npos) << said;
}

TEST_F(EnginePeer, RemovingThePodDuringAHandshakeEndsIt) {
  Tcp tcp = rawTunnel(lab);
  tcp.send("\x16\x03\x01");  // a ClientHello that never goes on
  for (int i = 0; i < 50 && lab.two->connections().empty() && i < 3; i++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  lab.two->removePod("server-uid");
  EXPECT_EQ(tcp.receiveAll(), "");
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kDrained);
  EXPECT_FALSE(record->established);
  EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
  EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
  // And nothing of the pod's share stays taken.
  lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  lab.two->connections();
  auto good = lab.authority.issue(Lab::kClientUri);
  EXPECT_TRUE(TlsClient(lab, {&good}).accepted);
}

// A handshake goes on with what it began with, and the next one has the new certificate.
TEST_F(EnginePeer, ReplacingTheCertificateDuringAHandshakeDoesNotDisturbIt) {
  Tcp tcp = rawTunnel(lab);
  lab.two->connections();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  Authority next("next root");
  lab.two->setCertificate(Lab::kServerUri, next.issue(Lab::kServerUri));
  lab.two->connections();
  auto old = lab.authority.issue(Lab::kClientUri), fresh = next.issue(Lab::kClientUri);
  EXPECT_TRUE(TlsClient(std::move(tcp), {&old}).accepted) << "began under the old root";
  EXPECT_FALSE(TlsClient(lab, {&old}).accepted);
  EXPECT_TRUE(TlsClient(lab, {&fresh}).accepted);
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kPeerUntrusted);
  EXPECT_EQ(lab.two->stats().handshakes, 2u);
  EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
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
  refused({&good, TLS1_3_VERSION, "http/1.1"}, Reason::kH2HandshakeFailed);
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
