// The engine over time: late certificates, pods that come and go, rotation, GOAWAY and draining, stopping
// under load.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

#include "lab.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

// Echoes every connection until destroyed.
class EchoServer {
 public:
  EchoServer(const Netns& in, uint16_t port) : listener_(listenOn(in, port)) {
    thread_ = std::thread([this] {
      while (!stop_) {
        Tcp accepted = acceptFrom(listener_);
        if (!accepted) continue;
        std::lock_guard lock(mutex_);
        threads_.emplace_back([connection = std::make_shared<Tcp>(std::move(accepted))] {
          for (;;) {
            std::string byte = connection->receive(1);
            if (byte.empty() || !connection->send(byte)) return;
          }
        });
      }
    });
  }
  ~EchoServer() {
    stop_ = true;
    shutdown(listener_.fd(), SHUT_RDWR);
    thread_.join();
    for (auto& thread : threads_) thread.join();
  }

 private:
  Tcp listener_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<std::thread> threads_;
  std::thread thread_;
};

bool echoes(Tcp& connection) {
  return connection.send("e") && connection.receive(1) == "e";
}

TEST(EngineLife, WaitsForTheCertificateAndAsksForIt) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  lab.one->removeCertificate(Lab::kClientUri);
  lab.one->connections();  // asks every worker, so that they have seen the removal
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  near.send("e");
  std::this_thread::sleep_for(200ms);
  ASSERT_EQ(lab.one_events.needed(), std::vector<std::string>{Lab::kClientUri});
  lab.one->setCertificate(Lab::kClientUri, lab.authority.issue(Lab::kClientUri));
  EXPECT_EQ(near.receive(1), "e");
}

TEST(EngineLife, GivesUpWithoutCertificateOrWorkload) {
  Lab lab([](EngineConfig& config) { config.local_workload_timeout = 200ms; });
  lab.one->removeCertificate(Lab::kClientUri);
  lab.one->connections();  // asks every worker, so that they have seen the removal
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(
      lab.one_events.wait([](const AccessRecord& each) { return each.reason == Reason::kNoCertificate; }));
  StateDelta gone;
  gone.removed_addresses = {"Kubernetes//Pod/default/client"};
  lab.one->apply(gone);
  lab.one->connections();
  Tcp again = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(again.isReset());
  EXPECT_TRUE(lab.one_events.wait(
      [](const AccessRecord& each) { return each.reason == Reason::kUnknownLocalWorkload; }));
}

TEST(EngineLife, RefusesTheMeshOwnPorts) {
  Lab lab;
  Tcp near = connectTo(lab.client, "127.0.0.1", 15001);
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(lab.one_events.wait([](const AccessRecord& each) { return each.reason == Reason::kLoop; }));
  Tcp far = connectTo(lab.client, Lab::kServerIp, 15006);
  EXPECT_TRUE(far.isReset());
  EXPECT_TRUE(
      lab.two_events.wait([](const AccessRecord& each) { return each.reason == Reason::kIllegalPort; }));
}

TEST(EngineLife, APodThatIsBeingEnrolledIsTriedAgain) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  lab.two->removePod("server-uid");
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  std::this_thread::sleep_for(250ms);
  lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  EXPECT_TRUE(echoes(near));
}

TEST(EngineLife, AHopThatStaysRefusedIsSaid) {
  Lab lab;
  lab.two->removePod("server-uid");
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(near.isReset());
  auto record = lab.one_events.wait([](const AccessRecord& each) { return !each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->reason, Reason::kConnectRefused) << record->detail;
}

TEST(EngineLife, RemovingAPodEndsItsConnectionsAtOnce) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  lab.two->removePod("server-uid");
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(lab.two_events.wait([](const AccessRecord& each) { return each.reason == Reason::kDrained; }));
  lab.two->removePod("server-uid");  // unknown by now
  lab.two->addPod({"server-uid", "server", "default", "server", lab.server.duplicate()});
  Tcp again = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(echoes(again));
  lab.one->removePod("client-uid");
  EXPECT_TRUE(again.isReset());
}

TEST(EngineLife, RotatesCertificatesUnderLoad) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0}, rounds{0};
  Tcp old = connectTo(lab.client, Lab::kServerIp, 8080);
  std::vector<std::thread> load;
  for (int i = 0; i < 3; i++) {
    load.emplace_back([&] {
      while (!stop) {
        Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
        if (!near || !echoes(near) || !echoes(near)) failures++;
        rounds++;
      }
    });
  }
  for (int i = 0; i < 20; i++) {
    lab.one->setCertificate(Lab::kClientUri, lab.authority.issue(Lab::kClientUri));
    lab.two->setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
    std::this_thread::sleep_for(30ms);
  }
  stop = true;
  for (auto& thread : load) thread.join();
  EXPECT_EQ(failures, 0);
  EXPECT_GT(rounds, 20);
  EXPECT_TRUE(echoes(old));
  EXPECT_GE(lab.one->stats().handshakes, 10u);
  old.close();
}

TEST(EngineLife, DrainingLetsOpenStreamsEndAndTheClientGoElsewhere) {
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
TEST(EngineLife, NothingThatConnectedIsResetWhenDrainingBegins) {
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

TEST(EngineLife, DrainingEndsAtItsDeadline) {
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

TEST(EngineLife, APeerThatVanishesIsNoticed) {
  Lab lab([](EngineConfig& config) {
    config.ping_interval = 200ms;
    config.ping_timeout = 500ms;
  });
  EchoServer echo(lab.server, 8080);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  std::this_thread::sleep_for(1s);
  ASSERT_TRUE(echoes(near)) << "an idle connection must survive keepalive";
  lab.server.run("ip link set mesh1 down");
  EXPECT_TRUE(near.isReset());
  EXPECT_TRUE(
      lab.one_events.wait([](const AccessRecord& each) { return each.reason == Reason::kTunnelLost; }));
}

TEST(EngineLife, UnusedTunnelsAreReleased) {
  Lab lab([](EngineConfig& config) { config.pool_idle = 200ms; });
  EchoServer echo(lab.server, 8080);
  {
    Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
    ASSERT_TRUE(echoes(near));
  }
  for (int i = 0; i < 50 && lab.two->stats().hbone_connections > 0; i++) std::this_thread::sleep_for(50ms);
  EXPECT_EQ(lab.one->stats().hbone_connections, 0u);
  EXPECT_EQ(lab.two->stats().hbone_connections, 0u);
  Tcp again = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(echoes(again));
}

TEST(EngineLife, StopsUnderLoadAndTwice) {
  Lab lab;
  EchoServer echo(lab.server, 8080);
  std::atomic<bool> stop{false};
  std::vector<std::thread> load;
  for (int i = 0; i < 3; i++) {
    load.emplace_back([&] {
      while (!stop) {
        Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
        if (near) echoes(near);
      }
    });
  }
  std::this_thread::sleep_for(300ms);
  lab.two->stopNow();
  lab.two->stopNow();
  lab.one->stopNow();
  stop = true;
  for (auto& thread : load) thread.join();
  EXPECT_TRUE(lab.one->connections().empty());
}

TEST(EngineLife, BadBundlesAreRefusedWithAReason) {
  Lab lab;
  auto bundle = lab.authority.issue(Lab::kClientUri);
  auto other = lab.authority.issue(Lab::kClientUri);
  CertificateBundle mixed = bundle;
  mixed.key_pem = other.key_pem;
  EXPECT_THROW(lab.one->setCertificate(Lab::kClientUri, mixed), std::runtime_error);
  mixed = bundle;
  mixed.roots_pem = "junk";
  EXPECT_THROW(lab.one->setCertificate(Lab::kClientUri, mixed), std::runtime_error);
  EXPECT_THROW(lab.one->setCertificate("client", bundle), std::runtime_error);
  EXPECT_THROW(lab.one->addPod({"bad", "bad", "default", "bad", open("/dev/null", O_RDONLY)}),
               std::runtime_error);
}

}  // namespace
}  // namespace ebbtide::test
