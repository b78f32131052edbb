// Draining: what is open goes on, what had begun is taken, nothing new comes, and it always ends.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <future>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "drained.h"
#include "echo.h"
#include "faults.h"
#include "lab.h"
#include "peer.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

TEST(EngineDrain, TakesNoMorePods) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  Netns other;
  other.run("ip link set lo up");
  Drained drained;
  lab.two->drain(60s, drained.callback());
  EXPECT_THROW(lab.two->addPod({"other-uid", "other", "default", "other", other.duplicate()}),
               std::runtime_error);
  EXPECT_FALSE(connectTo(other, "127.0.0.1", 15008));
  EXPECT_EQ(errno, ECONNREFUSED);
  // What it has stays: the same namespace is no change, another one is not taken.
  lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  EXPECT_THROW(lab.two->addPod({"server-uid", "server", "default", "server", other.duplicate()}),
               std::runtime_error);
  EXPECT_TRUE(echoes(near));
  EXPECT_EQ(drained.times(), 0);
  lab.two->removePod("server-uid");
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(drained.within(10s));
}

TEST(EngineDrain, WaitsForAHandshakeThatHadBegun) {
  signal(SIGPIPE, SIG_IGN);
  Lab lab;
  auto good = lab.authority.issue(Lab::kClientUri);
  Tcp raw = rawTunnel(lab);
  Drained drained;
  lab.two->drain(60s, drained.callback());
  EXPECT_FALSE(drained.within(500ms));
  TlsClient client(std::move(raw), {&good});
  EXPECT_TRUE(client.accepted);
  EXPECT_TRUE(client.write(kPreface));
  EXPECT_TRUE(drained.within(10s));
  EXPECT_TRUE(client.closedByServer());
  EXPECT_EQ(lab.two->stats().handshakes, 1u);
  EXPECT_EQ(lab.two->stats().handshake_failures, 0u);
}

TEST(EngineDrain, DoesNotWaitForAHandshakeWithoutEnd) {
  Lab lab([](EngineConfig& config) { config.tls_timeout = 500ms; });
  Tcp silent = rawTunnel(lab);
  Drained drained;
  lab.two->drain(60s, drained.callback());
  EXPECT_TRUE(drained.within(10s));
}

TEST(EngineDrain, MayBeAskedForTwice) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  Drained drained, again, late;
  lab.one->drain(60s, drained.callback());
  lab.one->drain(60s, again.callback());
  EXPECT_FALSE(drained.within(300ms));
  near.close();
  EXPECT_TRUE(drained.within(10s));
  EXPECT_TRUE(again.within(10s));
  lab.one->drain(60s, late.callback());
  EXPECT_TRUE(late.within(10s));
  EXPECT_EQ(drained.times() + again.times() + late.times(), 3);
}

TEST(EngineDrain, EndsOnceAlsoWhenMemoryRunsOut) {
  Collector events;
  uint64_t faults = 0;
  for (int64_t n = 1; n <= 20; n++) {
    EngineConfig config;
    config.workers = 1;
    Drained drained, again;
    Engine engine(config, events);
    engine.start();
    engine.connections();  // the worker runs
    faults::failAllocation(n);
    engine.drain(2s, drained.callback());
    engine.drain(2s, again.callback());
    EXPECT_TRUE(drained.within(10s)) << n;
    EXPECT_TRUE(again.within(10s)) << n;
    faults::failAllocation(0);
    faults += engine.stats().faults;
    engine.stopNow();
    EXPECT_EQ(drained.times(), 1) << n;
    EXPECT_EQ(again.times(), 1) << n;
  }
  EXPECT_GT(faults, 2u);
}

TEST(EngineDrain, LetsOpenStreamsEndAndTheClientGoElsewhere) {
  Lab lab;
  auto echo = std::make_unique<EchoServer>(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  std::promise<void> done;
  auto ended = done.get_future();
  lab.two->drain(20s, [&] { done.set_value(); });
  std::this_thread::sleep_for(500ms);
  EXPECT_TRUE(echoes(near));
  EXPECT_EQ(ended.wait_for(0s), std::future_status::timeout);
  // A second engine takes the pod over while the first drains.
  Collector events;
  EngineConfig config;
  config.workers = 1;
  config.state.node_name = "two";
  config.state.cluster_id = "Kubernetes";
  Engine successor(config, events);
  successor.start();
  StateDelta delta;
  delta.workloads = {lab.workload("client", Lab::kClientIp, "one"),
                     lab.workload("server", Lab::kServerIp, "two")};
  successor.apply(delta);
  successor.setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
  successor.addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  Tcp next = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(echoes(next));
  EXPECT_EQ(successor.stats().open_connections, 1u);
  EXPECT_TRUE(echoes(near));
  near.close();
  EXPECT_EQ(ended.wait_for(5s), std::future_status::ready);
  next.close();
}

// What the kernel has accepted for the proxy is the proxy's, also when it is about to close its listeners.
TEST(EngineDrain, NothingThatConnectedIsResetWhenItBegins) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  std::atomic<bool> stop{false};
  std::atomic<int> served{0}, broken{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 12; i++) {
    clients.emplace_back([&] {
      while (!stop) {
        Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
        if (!near) continue;
        if (echoes(near)) {
          served++;
        } else {
          broken++;
        }
      }
    });
  }
  for (int i = 0; i < 2000 && served < 50; i++) std::this_thread::sleep_for(10ms);
  std::promise<void> done;
  lab.one->drain(10s, [&] { done.set_value(); });
  EXPECT_EQ(done.get_future().wait_for(20s), std::future_status::ready);
  stop = true;
  for (auto& client : clients) client.join();
  EXPECT_EQ(broken, 0);
  EXPECT_GE(served, 50);
}

// The node's side of the server, replaced under load as an upgrade does it.
TEST(EngineDrain, ASuccessorTakesOverWithoutAFailure) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  std::atomic<bool> stop{false};
  std::atomic<int> served{0}, broken{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 12; i++) {
    clients.emplace_back([&] {
      while (!stop) {
        Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
        (near && echoes(near) ? served : broken)++;
      }
    });
  }
  auto serve = [&](int more) {
    for (int until = served + more, i = 0; i < 2000 && served < until; i++) std::this_thread::sleep_for(10ms);
  };
  serve(50);
  Collector events;
  EngineConfig config;
  config.workers = 1;
  config.state.node_name = "two";
  config.state.cluster_id = "Kubernetes";
  Engine successor(config, events);
  successor.start();
  StateDelta delta;
  delta.workloads = {lab.workload("client", Lab::kClientIp, "one"),
                     lab.workload("server", Lab::kServerIp, "two")};
  successor.apply(delta);
  successor.setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
  successor.addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  Drained drained;
  lab.two->drain(20s, drained.callback());
  EXPECT_TRUE(drained.within(30s));
  lab.two->stopNow();
  serve(50);
  stop = true;
  for (auto& client : clients) client.join();
  EXPECT_EQ(broken, 0);
  EXPECT_GE(served, 100);
  EXPECT_GT(successor.stats().handshakes, 0u);
}

TEST(EngineDrain, EndsAtItsDeadline) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  std::promise<void> done;
  auto ended = done.get_future();
  lab.one->drain(300ms, [&] { done.set_value(); });
  EXPECT_EQ(ended.wait_for(5s), std::future_status::ready);
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(lab.one_events.wait([](const AccessRecord& each) { return each.reason == Reason::kDrained; }));
}

}  // namespace
}  // namespace ebbtide::test
