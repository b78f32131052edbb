// Peers that mean harm: floods, half-open connections, more than their share. The engine stays up, bounded,
// and serves the others.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "bytes.h"
#include "lab.h"
#include "loop.h"
#include "peer.h"
#include "socket.h"

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

// A CONNECT request without compression state: every field literal, none indexed.
std::string connectFrame(uint32_t stream, const std::string& authority) {
  auto literal = [](char index, const std::string& value) {
    return std::string(1, index) + static_cast<char>(value.size()) + value;
  };
  std::string block = literal('\x02', "CONNECT") + literal('\x01', authority);  // :method, :authority
  std::string frame = {0, 0, static_cast<char>(block.size()), 1, 4};
  for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift);
  return frame + block;
}

std::string resetFrame(uint32_t stream) {
  std::string frame("\0\0\4\3\0", 5);
  for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift);
  return frame + std::string("\0\0\0\x8", 4);  // CANCEL
}

TEST_F(EngineAbuse, RequestsTakenBackUnansweredAreClosed) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  std::string flood = kPreface;
  for (uint32_t i = 0; i < 1500; i++) {
    flood += connectFrame(2 * i + 1, "10.77.0.2:8080") + resetFrame(2 * i + 1);
  }
  client.write(flood);
  for (int i = 0; i < 50 && lab.two->stats().hbone_connections > 0; i++) std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
  EXPECT_EQ(lab.two->stats().open_connections, 0u);
}

TEST_F(EngineAbuse, ResetsOfAnsweredStreamsDoNotEndTheTunnel) {
  Tcp listener = listenOn(lab.server, 8080);
  Tcp kept = connectTo(lab.client, Lab::kServerIp, 8080);
  Tcp kept_far = acceptFrom(listener);
  ASSERT_TRUE(kept && kept_far);
  for (int i = 0; i < 1600; i++) {
    Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
    Tcp far = acceptFrom(listener);
    ASSERT_TRUE(near && far) << i;
    near.abort();
  }
  EXPECT_EQ(lab.one->stats().handshakes, 1u);
  ASSERT_TRUE(kept.send("still here"));
  EXPECT_EQ(kept_far.receive(10), "still here");
}

TEST_F(EngineAbuse, AuthoritiesAreLoggedInPart) {
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  // Two lengths of more than 7 bits: 127 + 2000 as HPACK writes it.
  std::string authority(2127, 'a');
  std::string block =
      "\x02\x07"
      "CONNECT" +
      std::string("\x01\x7f\xd0\x0f", 4) + authority;
  std::string frame = {
      0, static_cast<char>(block.size() >> 8), static_cast<char>(block.size()), 1, 4, 0, 0, 0, 1};
  ASSERT_TRUE(client.write(kPreface + frame + block));
  auto record = inboundWith(Reason::kBadRequest);
  ASSERT_TRUE(record);
  EXPECT_LE(record->hbone_address.size(), 300u);
  EXPECT_LE(record->detail.size(), 400u);
}

// What ztunnel sends when its application finished and then went away.
TEST_F(EngineAbuse, CancelAfterTheEndIsNoTruncation) {
  Tcp listener = listenOn(lab.server, 8080);
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write(kPreface + connectFrame(1, "10.77.0.2:8080")));
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(far);
  std::this_thread::sleep_for(100ms);
  ASSERT_TRUE(client.write(std::string("\0\0\5\0\1\0\0\0\1", 9) + "hello" + resetFrame(1)));
  EXPECT_EQ(far.receive(5), "hello");
  EXPECT_EQ(far.receive(1), "");
  EXPECT_EQ(errno, 0);
  // Without the end it must not look like one.
  ASSERT_TRUE(client.write(connectFrame(3, "10.77.0.2:8080")));
  Tcp cut = acceptFrom(listener);
  ASSERT_TRUE(cut);
  std::this_thread::sleep_for(100ms);
  ASSERT_TRUE(client.write(resetFrame(3)));
  EXPECT_TRUE(cut.isReset());
}

TEST(EngineShare, APodMayNotHoldMoreUnfinishedHandshakesThanItsShare) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab([](EngineConfig& config) { config.max_descriptors = 200; });  // so 16 handshakes
  std::vector<Tcp> silent;
  for (int i = 0; i < 40; i++) silent.push_back(rawTunnel(lab));
  auto record = lab.two_events.wait(
      [](const AccessRecord& each) { return each.reason == Reason::kTooManyConnections; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->source.ip.toString(), Lab::kClientIp);
  silent.clear();
  auto good = lab.authority.issue(Lab::kClientUri);
  bool accepted = false;
  for (int i = 0; i < 20 && !accepted; i++) {
    accepted = TlsClient(lab, {&good}).accepted;
    if (!accepted) std::this_thread::sleep_for(100ms);
  }
  EXPECT_TRUE(accepted) << "closed connections must give their places back";
}

// Four addresses beside the pod's first one.
void addAddresses(const Lab& lab) {
  for (int i = 11; i < 16; i++) lab.client.run("ip addr add 10.77.0." + std::to_string(i) + "/24 dev mesh0");
}

bool stillOpen(const Tcp& tcp) {
  pollfd ready{tcp.fd(), POLLIN, 0};
  return poll(&ready, 1, 0) == 0;
}

TEST(EngineShare, OneAddressMayNotTakeThePlacesOfOthers) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab([](EngineConfig& config) { config.max_descriptors = 200; });  // so 16 handshakes, 4 an address
  addAddresses(lab);
  Tcp waiting = rawTunnel(lab, "10.77.0.11");
  std::vector<Tcp> flood;
  for (int i = 0; i < 40; i++) flood.push_back(rawTunnel(lab, "10.77.0.12"));
  ASSERT_TRUE(lab.two_events.wait(
      [](const AccessRecord& each) { return each.reason == Reason::kTooManyConnections; }));
  for (int i = 0; i < 50 && lab.two->stats().handshake_failures < 36; i++) std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lab.two->stats().handshake_failures, 36u);
  EXPECT_TRUE(stillOpen(waiting));
  EXPECT_FALSE(stillOpen(flood[0])) << "the oldest goes";
  EXPECT_TRUE(stillOpen(flood[39])) << "the newest stays";
  auto good = lab.authority.issue(Lab::kClientUri);
  EXPECT_TRUE(TlsClient(std::move(waiting), {&good}).accepted);
}

TEST(EngineShare, WhenAllPlacesAreTakenTheOldestHandshakeMakesRoom) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab([](EngineConfig& config) { config.max_descriptors = 200; });
  addAddresses(lab);
  std::vector<Tcp> flood;
  for (int i = 0; i < 16; i++) flood.push_back(rawTunnel(lab, "10.77.0.1" + std::to_string(1 + i % 4)));
  auto good = lab.authority.issue(Lab::kClientUri);
  // At the first attempt, and although nobody's time is up.
  EXPECT_TRUE(TlsClient(lab, {&good}).accepted);
  EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kTooManyConnections);
  EXPECT_EQ(record->source.ip.toString(), "10.77.0.11");
}

// Reads nothing, and lets the application send as much as it likes.
TEST(EngineStall, APeerThatSendsAndNeverReadsIsClosed) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab([](EngineConfig& config) {
    config.ping_interval = 200ms;
    config.ping_timeout = 1000ms;
  });
  Tcp listener = listenOn(lab.server, 8080);
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good, TLS1_3_VERSION, "h2", 4096});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write(kPreface + windowFrame(0, 1u << 30) + connectFrame(1, "10.77.0.2:8080") +
                           windowFrame(1, 1u << 30)));
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(far);
  std::thread sender([&] { far.send(std::string(64u << 20, 'x')); });
  auto open = [&] { return lab.two->stats().hbone_connections; };
  for (int i = 0; i < 150 && open() > 0; i++) {
    client.write(windowFrame(0, 1));  // alive, in a way
    std::this_thread::sleep_for(100ms);
  }
  EXPECT_EQ(open(), 0u);
  shutdown(far.fd(), SHUT_RDWR);
  sender.join();
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kTunnelLost);
  EXPECT_EQ(record->detail, "the peer does not read");
}

TEST(EngineStall, APeerThatSendsAndNeverAnswersPingIsClosed) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab([](EngineConfig& config) {
    config.ping_interval = 200ms;
    config.ping_timeout = 400ms;
  });
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  ASSERT_TRUE(client.accepted);
  ASSERT_TRUE(client.write(kPreface));
  auto open = [&] { return lab.two->stats().hbone_connections; };
  for (int i = 0; i < 100 && open() > 0; i++) {
    client.write(windowFrame(0, 1));
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_EQ(open(), 0u);
}

// Two engines that answer each other, with data all the while and with none.
TEST(EngineStall, ATunnelThatAnswersStays) {
  Lab lab([](EngineConfig& config) {
    config.ping_interval = 100ms;
    config.ping_timeout = 3000ms;
  });
  Tcp listener = listenOn(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(near && far);
  auto until = std::chrono::steady_clock::now() + 2s;
  std::string chunk(256u << 10, 'b');
  std::thread reader([&] { far.receiveAll(); });
  while (std::chrono::steady_clock::now() < until) ASSERT_TRUE(near.send(chunk));
  std::this_thread::sleep_for(1s);
  ASSERT_TRUE(near.send(chunk));
  near.finish();
  reader.join();
  EXPECT_EQ(lab.one->stats().handshakes, 1u);
}

TEST(EngineShare, OnePodLeavesDescriptorsToOthers) {
  Lab lab([](EngineConfig& config) { config.max_descriptors = 100; });
  Tcp listener = listenOn(lab.server, 8080);
  std::vector<Tcp> near;
  for (int i = 0; i < 90; i++) near.push_back(connectTo(lab.client, Lab::kServerIp, 8080));
  ASSERT_TRUE(lab.one_events.wait(
      [](const AccessRecord& each) { return each.reason == Reason::kTooManyConnections; }));
  EXPECT_LE(lab.one->stats().open_connections, 76u);  // one descriptor each, three quarters of a hundred
  // Another pod of the same node is served.
  Netns other;
  other.run("ip link set lo up; ip link add mesh0 type veth peer name mesh1; ip link set mesh0 up");
  StateDelta delta;
  delta.workloads = {lab.workload("other", "10.77.0.9", "one")};
  lab.apply(delta);
  lab.one->addPod({"other-uid", "other", "default", "other", other.duplicate()});
  lab.one->connections();
  connectTo(other, "127.0.0.1", 15001);
  auto record = lab.one_events.wait(
      [](const AccessRecord& each) { return each.source_workload && each.source_workload->name == "other"; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kLoop) << "served, and then refused for what it asked";
  for (auto& each : near) {
    if (each) each.abort();
  }
  auto open = [&] { return lab.one->stats().open_connections + lab.two->stats().open_connections; };
  for (int i = 0; i < 50 && open() > 0; i++) std::this_thread::sleep_for(100ms);
  EXPECT_EQ(open(), 0u);
  Tcp again = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(again.send("x"));
}

TEST(BufferShare, WhoStallsIsHeldBackAndNobodyElse) {
  constexpr uint64_t kCap = 256u << 20, kPodCap = kCap / 4;
  BufferBudget whole(kCap);
  std::vector<std::unique_ptr<BufferBudget>> stalled;
  for (int i = 0; i < 4; i++) stalled.push_back(std::make_unique<BufferBudget>(whole));
  BufferBudget quiet(whole);
  quiet.add(1u << 20);
  stalled[0]->add(kPodCap / 2 + 1);
  EXPECT_TRUE(stalled[0]->pressed());
  EXPECT_FALSE(stalled[0]->exceeded());
  stalled[0]->add(kPodCap / 2);
  EXPECT_TRUE(stalled[0]->exceeded());
  EXPECT_FALSE(stalled[0]->spent(1));
  EXPECT_TRUE(stalled[0]->spent(kPodCap / 4));
  EXPECT_FALSE(quiet.exceeded());
  for (int i = 1; i < 4; i++) stalled[i]->add(kPodCap);
  EXPECT_TRUE(whole.exceeded());
  EXPECT_TRUE(quiet.wholeExceeded());
  for (auto& each : stalled) EXPECT_TRUE(each->exceeded());
  EXPECT_FALSE(quiet.exceeded());
  EXPECT_FALSE(quiet.spent(1));
  EXPECT_TRUE(quiet.spent(kCap / 4)) << "not more than five quarters of the whole's cap";
  for (auto& each : stalled) each->subtract(each->used());
  EXPECT_EQ(whole.used(), quiet.used());
}

// A thread that could not enter a pod's namespace must not dial from where it happens to be.
TEST(ThreadNamespaces, FailureIsSaidAndTheThreadStaysWhereItWas) {
  Netns first, second;
  std::thread([&] {
    auto here = [] {
      struct stat now{};
      stat("/proc/thread-self/ns/net", &now);
      return now.st_ino;
    };
    auto inodeOf = [](int fd) {
      struct stat found{};
      fstat(fd, &found);
      return found.st_ino;
    };
    ThreadNamespace place;
    auto home = here();
    int a = 0, b = 0, c = 0;
    EXPECT_EQ(place.enter(&a, first.fd()), 0);
    EXPECT_EQ(here(), inodeOf(first.fd()));
    Fd nothing(open("/dev/null", O_RDONLY | O_CLOEXEC));
    EXPECT_NE(place.enter(&b, nothing.get()), 0);
    EXPECT_NE(place.enter(&b, -1), 0);
    EXPECT_EQ(here(), inodeOf(first.fd()));
    EXPECT_EQ(place.enter(&c, second.fd()), 0);
    EXPECT_EQ(here(), inodeOf(second.fd()));
    place.leave(&a);
    EXPECT_EQ(here(), inodeOf(second.fd()));
    place.leave(&c);
    EXPECT_EQ(here(), home);
  }).join();
}

}  // namespace
}  // namespace ebbtide::test
