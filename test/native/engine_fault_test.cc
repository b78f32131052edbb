// What fails inside the engine fails alone: memory that runs out at any moment, descriptors that the kernel
// does not watch. The loop's part of it is in loop_fault_test.cc.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <chrono>
#include <csignal>
#include <new>
#include <thread>
#include <vector>

#include "faults.h"
#include "lab.h"
#include "peer.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

class Refusing final : public EngineEvents {
 public:
  void onAccess(std::vector<AccessRecord>) override { throw std::bad_alloc(); }
  void onCertificateNeeded(const std::string&) override {}
  void onFault(const char*, const char*) override {}
};

TEST(EngineRecords, ThoseThatCannotBeGivenAwayAreCounted) {
  Lab lab;
  lab.one->removePod("client-uid");
  EngineConfig config;
  config.workers = 1;
  config.state.node_name = "one";
  config.state.cluster_id = "Kubernetes";
  Refusing events;
  Engine engine(config, events);
  engine.start();
  StateDelta delta;
  delta.workloads = {lab.workload("client", Lab::kClientIp, "one")};
  engine.apply(delta);
  engine.addPod({"client-uid", "client", "default", "client", lab.client.duplicate()});
  Tcp near = connectTo(lab.client, "127.0.0.1", 15001);
  EXPECT_TRUE(near.isReset());
  for (int i = 0; i < 500 && engine.stats().access_records_dropped == 0; i++)
    std::this_thread::sleep_for(10ms);
  EXPECT_EQ(engine.stats().access_records_dropped, 1u);
  EXPECT_EQ(engine.stats().faults, 1u);
}

class EngineFault : public testing::Test {
 protected:
  void SetUp() override {
    signal(SIGPIPE, SIG_IGN);
    // Both workers watch their listeners by now: what fails from here on is what a test lets fail.
    lab.one->connections();
    lab.two->connections();
    listener = listenOn(lab.server, 8080);
    echo = std::thread([this] {
      while (!stop) {
        Tcp accepted = acceptFrom(listener);
        if (accepted)
          std::thread(
              [](Tcp each) {
                for (std::string byte; !(byte = each.receive(1)).empty() && each.send(byte);) {
                }
              },
              std::move(accepted))
              .detach();
      }
    });
  }
  void TearDown() override {
    faults::failAllocation(0);
    faults::failWatching(0);
    stop = true;
    shutdown(listener.fd(), SHUT_RDWR);
    echo.join();
  }
  bool echoes() {
    Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
    if (!near) return false;
    timeval limit{2, 0};
    setsockopt(near.fd(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return near.send("e") && near.receive(1) == "e";
  }
  bool echoesSoon() {
    for (int i = 0; i < 20; i++) {
      if (echoes()) return true;
      std::this_thread::sleep_for(50ms);
    }
    return false;
  }
  uint64_t faultsOfBoth() { return lab.one->stats().faults + lab.two->stats().faults; }

  Lab lab;
  Tcp listener;
  std::thread echo;
  std::atomic<bool> stop{false};
};

// Every allocation between connect() and the last byte, and of a new tunnel, fails once.
TEST_F(EngineFault, MemoryMayRunOutAtAnyMomentOfAConnection) {
  auto open = [&] { return lab.one->stats().open_connections + lab.two->stats().open_connections; };
  int64_t reached = 0;
  for (int64_t n = 1; n < reached + 20; n++) {
    // Every other one over a new tunnel.
    if (n % 2 == 0) lab.one->setCertificate(Lab::kClientUri, lab.authority.issue(Lab::kClientUri));
    lab.one->connections();
    faults::failAllocation(n);
    echoes();
    for (int i = 0; i < 100 && open() > 0; i++) std::this_thread::sleep_for(2ms);
    if (faults::allocationFailed()) reached = n;
    faults::failAllocation(0);
    // Long before anything would time out.
    for (int i = 0; i < 1500 && open() > 0; i++) std::this_thread::sleep_for(2ms);
    ASSERT_EQ(open(), 0u) << "after the failure of allocation " << n;
    if (n % 16 == 0) {
      ASSERT_TRUE(echoesSoon()) << "after the failure of allocation " << n;
    }
  }
  EXPECT_GT(reached, 30);
  EXPECT_GT(faultsOfBoth(), 20u);
  EXPECT_FALSE(lab.one_events.faults().empty());
  ASSERT_TRUE(echoesSoon());
}

// A tunnel is lost by what fails in its own framing, never by what one of its streams lacks memory for.
TEST_F(EngineFault, WhatAStreamHasNoMemoryForEndsThatStreamOnly) {
  auto open = [&] { return lab.one->stats().open_connections + lab.two->stats().open_connections; };
  auto framing = [&] {
    size_t n = 0;
    for (auto* events : {&lab.one_events, &lab.two_events}) {
      for (auto& each : events->faults()) n += each.starts_with("tunnel:") ? 1 : 0;
    }
    return n;
  };
  auto works = [](Tcp& each) { return each && each.send("e") && each.receive(1) == "e"; };
  Tcp held;
  int survived = 0;
  for (int64_t n = 1; n < 80; n++) {
    if (!works(held)) held = connectTo(lab.client, Lab::kServerIp, 8080);
    ASSERT_TRUE(works(held));
    size_t before = framing(), faults = faultsOfBoth();
    faults::failAllocation(n);
    echoes();
    for (int i = 0; i < 100 && open() > 2; i++) std::this_thread::sleep_for(2ms);
    faults::failAllocation(0);
    for (int i = 0; i < 1500 && open() > 2; i++) std::this_thread::sleep_for(2ms);
    if (faultsOfBoth() == faults || framing() != before) continue;
    survived++;
    EXPECT_TRUE(works(held)) << "after the failure of allocation " << n;
  }
  EXPECT_GT(survived, 10);
}

// The messages of the controlling thread.
TEST_F(EngineFault, MemoryMayRunOutAtAnyMomentOfATask) {
  ASSERT_TRUE(echoes());
  for (int64_t n = 1; n <= 40; n++) {
    faults::failAllocation(n);
    lab.two->removePod("server-uid");
    lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
    lab.two->setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
    lab.one->apply({});
    lab.one->connections();
    lab.two->connections();
    faults::failAllocation(0);
    if (n % 5 == 0) {
      ASSERT_TRUE(echoesSoon()) << "after the failure of allocation " << n;
    }
  }
  EXPECT_GT(faultsOfBoth(), 5u);
}

TEST_F(EngineFault, AConnectionThatTheKernelDoesNotWatchIsRefusedAndSaid) {
  faults::failWatching(1);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(near.isReset());
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kInternal);
  EXPECT_NE(record->detail.find("No space left on device"), std::string::npos) << record->detail;
  EXPECT_EQ(lab.one->stats().faults, 1u);
  EXPECT_EQ(lab.one_events.faults().size(), 1u);
  EXPECT_TRUE(echoes());
}

TEST_F(EngineFault, ATunnelThatTheKernelDoesNotWatchIsRefusedAndSaid) {
  faults::failWatching(1);
  auto good = lab.authority.issue(Lab::kClientUri);
  TlsClient client(lab, {&good});
  EXPECT_FALSE(client.accepted);
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kInternal);
  EXPECT_EQ(lab.two->stats().handshake_failures, 1u);
  EXPECT_EQ(lab.two->stats().faults, 1u);
  EXPECT_TRUE(TlsClient(lab, {&good}).accepted);
}

TEST_F(EngineFault, AListenerThatTheKernelDoesNotWatchIsTriedAgain) {
  lab.two->removePod("server-uid");
  faults::failWatching(3);
  lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  lab.two->connections();  // its worker has met all three: the connection that follows meets none
  EXPECT_TRUE(echoesSoon());
  EXPECT_EQ(lab.two->stats().faults, 3u);
}

}  // namespace
}  // namespace ebbtide::test
