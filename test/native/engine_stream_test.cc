// Bytes through the tunnel: order and completeness, half-close, reset, backpressure, many connections at
// once.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "lab.h"
#include "socket.h"

namespace ebbtide::test {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kBulk = 128u << 20;
constexpr int kMany = 300;
#else
constexpr uint64_t kBulk = 1u << 30;
constexpr int kMany = 1000;
#endif

class EngineStream : public testing::Test {
 protected:
  void SetUp() override { listener = listenOn(lab.server, 8080); }
  std::pair<Tcp, Tcp> open() {
    Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
    Tcp far = acceptFrom(listener);
    EXPECT_TRUE(near && far) << strerror(errno);
    return {std::move(near), std::move(far)};
  }
  explicit EngineStream(std::function<void(EngineConfig&)> adjust = nullptr) : lab(std::move(adjust)) {}
  Lab lab;
  Tcp listener;
};

// 64-bit words that tell their own position, so that loss, repetition and disorder are all seen.
void sendWords(Tcp& to, uint64_t bytes, uint64_t seed) {
  std::string chunk(64u << 10, '\0');
  auto* words = reinterpret_cast<uint64_t*>(chunk.data());
  for (uint64_t at = 0; at < bytes; at += chunk.size()) {
    for (size_t i = 0; i < chunk.size() / 8; i++) words[i] = (at / 8 + i) * 0x9E3779B97F4A7C15ull ^ seed;
    if (!to.send(chunk)) return;
  }
  to.finish();
}

uint64_t countGoodWords(Tcp& from, uint64_t seed) {
  uint64_t at = 0;
  for (;;) {
    std::string chunk = from.receive(64u << 10);
    auto* words = reinterpret_cast<const uint64_t*>(chunk.data());
    for (size_t i = 0; i < chunk.size() / 8; i++) {
      if (words[i] != ((at / 8 + i) * 0x9E3779B97F4A7C15ull ^ seed)) return at + i * 8;
    }
    at += chunk.size();
    if (chunk.size() < (64u << 10)) return at;
  }
}

TEST_F(EngineStream, CarriesBulkBothWaysAtOnceUnharmed) {
  auto [near, far] = open();
  uint64_t up = 0, down = 0;
  std::thread a([&] { sendWords(near, kBulk, 1); });
  std::thread b([&] { up = countGoodWords(far, 1); });
  std::thread c([&] { sendWords(far, kBulk, 2); });
  down = countGoodWords(near, 2);
  a.join();
  b.join();
  c.join();
  EXPECT_EQ(up, kBulk);
  EXPECT_EQ(down, kBulk);
  near.close();
  far.close();
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->bytes_received, kBulk);
  EXPECT_EQ(record->bytes_sent, kBulk);
}

TEST_F(EngineStream, ServerMayEndFirstAndStillReceive) {
  auto [near, far] = open();
  far.send("greeting");
  far.finish();
  EXPECT_EQ(near.receiveAll(), "greeting");
  EXPECT_EQ(errno, 0);
  ASSERT_TRUE(near.send("late answer"));
  EXPECT_EQ(far.receive(11), "late answer");
  near.finish();
  EXPECT_EQ(far.receive(1), "");
  EXPECT_EQ(errno, 0);
}

TEST_F(EngineStream, ServerSpeaksFirst) {
  auto [near, far] = open();
  far.send("220 ready");
  EXPECT_EQ(near.receive(9), "220 ready");
}

TEST_F(EngineStream, ResetOfTheClientReachesTheServer) {
  auto [near, far] = open();
  near.send("x");
  EXPECT_EQ(far.receive(1), "x");
  near.abort();
  EXPECT_TRUE(far.isReset());
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kApplicationReset);
}

TEST_F(EngineStream, ResetOfTheServerReachesTheClient) {
  auto [near, far] = open();
  far.send("y");
  EXPECT_EQ(near.receive(1), "y");
  far.abort();
  EXPECT_TRUE(near.isReset());
}

TEST_F(EngineStream, RefusedByTheApplicationIsAResetWithItsReason) {
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8081);
  ASSERT_TRUE(near);
  EXPECT_TRUE(near.isReset());
  auto out = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(out);
  EXPECT_EQ(out->reason, Reason::kConnectRejected);
  EXPECT_NE(out->detail.find("503"), std::string::npos) << out->detail;
  auto in = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(in);
  EXPECT_EQ(in->reason, Reason::kConnectRefused);
  EXPECT_FALSE(in->established);
}

TEST_F(EngineStream, AReaderThatStallsDoesNotStallOthers) {
  auto [stalled_near, stalled_far] = open();
  auto [near, far] = open();
  // Fill everything between until nothing more is taken for a while.
  std::string chunk(64u << 10, 's');
  uint64_t filled = 0;
  for (;;) {
    pollfd ready{stalled_near.fd(), POLLOUT, 0};
    if (poll(&ready, 1, 500) == 0) break;
    ssize_t n = send(stalled_near.fd(), chunk.data(), chunk.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) filled += static_cast<uint64_t>(n);
    ASSERT_LT(filled, 256u << 20) << "nothing holds the sender back";
  }
  EXPECT_LT(lab.two->stats().buffered_bytes, 6u << 20);
  uint64_t good = 0;
  std::thread sender([&, &to = near] { sendWords(to, 64u << 20, 3); });
  good = countGoodWords(far, 3);
  sender.join();
  EXPECT_EQ(good, 64u << 20);
  EXPECT_EQ(lab.one->stats().hbone_connections, 1u);
  // And the stalled one goes on where it was.
  stalled_near.finish();
  uint64_t drained = 0;
  for (std::string part; !(part = stalled_far.receive(1u << 20)).empty();) drained += part.size();
  EXPECT_EQ(drained, filled);
  EXPECT_EQ(lab.two->stats().buffered_bytes, 0u);
}

// Applications that showed that they read, and then stopped, all within one tunnel.
class EngineStalls : public EngineStream {
 protected:
  using EngineStream::EngineStream;
  // Sends until nothing is taken for a while.
  static void fill(const Tcp& to) {
    std::string chunk(64u << 10, 's');
    for (pollfd ready{to.fd(), POLLOUT, 0}; poll(&ready, 1, 100) == 1 && (ready.revents & POLLOUT) != 0;) {
      if (send(to.fd(), chunk.data(), chunk.size(), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) return;
    }
  }
  void stall(int count, uint64_t taken_first) {
    int small = 32u << 10;
    setsockopt(listener.fd(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    for (int i = 0; i < count; i++) {
      stalled.push_back(open());
      auto& [near, far] = stalled.back();
      int buffer = 128u << 10;
      setsockopt(near.fd(), SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
      if (taken_first == 0) continue;
      std::thread sender([&to = near, taken_first] { to.send(std::string(taken_first, 't')); });
      far.receive(taken_first);
      sender.join();
    }
    for (auto& [near, far] : stalled) {
      fill(near);
      most = std::max(most, lab.two->stats().buffered_bytes);
    }
    most = std::max(most, lab.two->stats().buffered_bytes);
  }
  // A further connection of the same tunnel moves this many bytes.
  void others(uint64_t bytes) {
    int large = 4u << 20;
    setsockopt(listener.fd(), SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
    auto [near, far] = open();
    uint64_t good = 0;
    std::thread sender([&, &to = near] { sendWords(to, bytes, 5); });
    good = countGoodWords(far, 5);
    sender.join();
    EXPECT_EQ(good, bytes);
    most = std::max(most, lab.two->stats().buffered_bytes);
  }
  std::vector<std::pair<Tcp, Tcp>> stalled;
  uint64_t most = 0;
};

TEST_F(EngineStalls, OfOneTunnelHoldNoMoreThanItsWindowsAndStallNobodyElse) {
  stall(60, 16u << 20);
  EXPECT_GT(most, 8u << 20) << "they do hold something";
  // The connection's window, and for each stream its first window, in chunks of 32 KiB.
  EXPECT_LT(most, (16u << 20) + 60 * (96u << 10));
  others(32u << 20);
  EXPECT_EQ(lab.one->stats().hbone_connections, 1u);
  // And none was cut for it.
  EXPECT_GE(lab.two->stats().open_connections, 60u);
}

class EngineBuffers : public EngineStalls {
 protected:
  EngineBuffers() : EngineStalls([](EngineConfig& config) { config.max_buffered = 8u << 20; }) {}
};

TEST_F(EngineBuffers, StayBelowTheirBoundByCuttingThoseWhoDoNotRead) {
  stall(60, 0);  // a pod's share is 2 MiB, so not all of these find a place
  EXPECT_LE(most, (2u << 20) / 4 * 5);
  auto record =
      lab.two_events.wait([](const AccessRecord& each) { return each.reason == Reason::kBuffersFull; });
  ASSERT_TRUE(record);
  EXPECT_TRUE(record->inbound);
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));
  others(32u << 20);
  EXPECT_LE(most, (2u << 20) / 4 * 5);
}

TEST_F(EngineStream, ManyConnectionsAtOnce) {
  std::vector<Tcp> near, far;
  std::thread server([&, &from = listener] {
    for (int i = 0; i < kMany; i++) far.push_back(acceptFrom(from));
  });
  for (int i = 0; i < kMany; i++) near.push_back(connectTo(lab.client, Lab::kServerIp, 8080));
  server.join();
  for (auto& each : far) ASSERT_TRUE(each);
  EXPECT_EQ(lab.one->stats().open_connections, static_cast<uint64_t>(kMany));
  EXPECT_LE(lab.one->stats().hbone_connections, static_cast<uint64_t>(kMany / 100 + 2));
  for (int i = 0; i < kMany; i++) ASSERT_TRUE(near[i].send(std::to_string(i) + "\n"));
  for (auto& each : far) {
    std::string line;
    for (std::string byte; (byte = each.receive(1)) != "\n" && !byte.empty();) line += byte;
    ASSERT_FALSE(line.empty());
    ASSERT_TRUE(each.send(line + "!"));
    each.finish();
  }
  for (int i = 0; i < kMany; i++) ASSERT_EQ(near[i].receiveAll(), std::to_string(i) + "!");
}

TEST_F(EngineStream, PlainClientIsServedUnderItsOwnAddressUnlessPolicyAsksForAnIdentity) {
  auto plain = [&] {
    int fd = -1;
    lab.client.within(
        [&] { fd = dial({*IpAddress::parse(Lab::kServerIp), 8080}, std::nullopt, false).fd.release(); });
    pollfd ready{fd, POLLOUT, 0};
    poll(&ready, 1, 5000);
    fcntl(fd, F_SETFL, 0);
    return Tcp(fd);
  };
  {
    Tcp near = plain();
    Tcp far = acceptFrom(listener);
    ASSERT_TRUE(far);
    EXPECT_EQ(peerOf(far).ip.toString(), Lab::kClientIp);
    near.send("plain");
    EXPECT_EQ(far.receive(5), "plain");
    // The same connection does not survive a policy that forbids it.
    lab.allowOnlyMesh();
    EXPECT_TRUE(far.isReset());
    auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
    ASSERT_TRUE(record);
    EXPECT_EQ(record->reason, Reason::kPolicyChanged);
  }
  Tcp near = plain();
  EXPECT_TRUE(near.isReset());
  auto record =
      lab.two_events.wait([](const AccessRecord& each) { return each.reason == Reason::kPolicyDenied; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->detail, "default/strict");
}

TEST_F(EngineStream, UnknownDestinationsPassThroughPlainly) {
  lab.server.run("ip addr add 10.77.0.3/24 dev mesh1");
  Tcp near = connectTo(lab.client, "10.77.0.3", 8080);
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(near && far);
  uint64_t good = 0;
  std::thread sender([&] { sendWords(near, 64u << 20, 4); });
  good = countGoodWords(far, 4);
  sender.join();
  EXPECT_EQ(good, 64u << 20);
  far.send("bye");
  far.close();
  EXPECT_EQ(near.receiveAll(), "bye");
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->source_identity, "");
  EXPECT_EQ(record->reason, Reason::kNone) << record->detail;
}

}  // namespace
}  // namespace ebbtide::test
