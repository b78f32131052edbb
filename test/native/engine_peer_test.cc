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
#include "socket.h"

namespace ebbtide::test {
namespace {

// A bare connection from the client's pod to the server's HBONE port, past the redirect rules.
Tcp rawTunnel(const Lab& lab) {
  int fd = -1;
  lab.client.within(
      [&] { fd = dial({*IpAddress::parse(Lab::kServerIp), kHbonePort}, std::nullopt, false).fd.release(); });
  pollfd ready{fd, POLLOUT, 0};
  poll(&ready, 1, 5000);
  fcntl(fd, F_SETFL, 0);
  timeval limit{10, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  return Tcp(fd);
}

// A TLS client that does what it is told, right or wrong.
class TlsClient {
 public:
  struct Options {
    const CertificateBundle* certificate = nullptr;
    int max_version = TLS1_3_VERSION;
    const char* alpn = "h2";
  };
  TlsClient(const Lab& lab, const Options& options) : tcp_(rawTunnel(lab)) {
    context_ = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_max_proto_version(context_, options.max_version);
    if (options.certificate != nullptr) use(*options.certificate);
    ssl_ = SSL_new(context_);
    if (options.alpn != nullptr) {
      std::string list = std::string(1, static_cast<char>(std::strlen(options.alpn))) + options.alpn;
      SSL_set_alpn_protos(ssl_, reinterpret_cast<const unsigned char*>(list.data()),
                          static_cast<unsigned>(list.size()));
    }
    SSL_set_fd(ssl_, tcp_.fd());
    connected = SSL_connect(ssl_) == 1;
    // In TLS 1.3 the client is done before the server looked at its certificate: the first read tells. A
    // server of HTTP/2 speaks first.
    char first[9];
    accepted = connected && SSL_read(ssl_, first, sizeof first) == sizeof first;
  }
  ~TlsClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }
  bool write(const std::string& data) {
    return SSL_write(ssl_, data.data(), static_cast<int>(data.size())) > 0;
  }
  bool newKeys(bool both) {
    return SSL_key_update(ssl_, both ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED) == 1;
  }
  bool readUntil(const std::string& text) {
    std::string got;
    char buffer[4096];
    for (int n; (n = SSL_read(ssl_, buffer, sizeof buffer)) > 0;) {
      got.append(buffer, static_cast<size_t>(n));
      if (got.find(text) != std::string::npos) return true;
    }
    return false;
  }
  // Reads until the server closes; true when it did within the socket's time limit.
  bool closedByServer() {
    char buffer[4096];
    int n;
    do {
      n = SSL_read(ssl_, buffer, sizeof buffer);
    } while (n > 0);
    return !(SSL_get_error(ssl_, n) == SSL_ERROR_SYSCALL && errno == EAGAIN);
  }
  bool connected, accepted;

 private:
  void use(const CertificateBundle& bundle) {
    BIO* chain = BIO_new_mem_buf(bundle.chain_pem.data(), -1);
    X509* certificate = PEM_read_bio_X509(chain, nullptr, nullptr, nullptr);
    SSL_CTX_use_certificate(context_, certificate);
    X509_free(certificate);
    BIO_free(chain);
    BIO* text = BIO_new_mem_buf(bundle.key_pem.data(), -1);
    EVP_PKEY* key = PEM_read_bio_PrivateKey(text, nullptr, nullptr, nullptr);
    SSL_CTX_use_PrivateKey(context_, key);
    EVP_PKEY_free(key);
    BIO_free(text);
  }
  Tcp tcp_;
  SSL_CTX* context_;
  SSL* ssl_;
};

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
