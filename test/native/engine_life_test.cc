// The engine over time: late certificates, pods that come and go, rotation, tunnels that end, stopping under
// load.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "echo.h"
#include "lab.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

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
  auto record =
      lab.one_events.wait([](const AccessRecord& each) { return each.reason == Reason::kTunnelLost; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->detail, "nothing that is sent to the peer is acknowledged");
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

TEST(EngineLife, ATunnelThatNobodyWaitedForIsReleased) {
  Lab lab([](EngineConfig& config) { config.pool_idle = 200ms; });
  lab.two->removeCertificate(Lab::kServerUri);
  lab.two->connections();
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(near);
  for (int i = 0; i < 200 && lab.two_events.needed().empty(); i++) std::this_thread::sleep_for(20ms);
  near.abort();
  auto waitFor = [](auto holds) {
    for (int i = 0; i < 500 && !holds(); i++) std::this_thread::sleep_for(10ms);
    return holds();
  };
  ASSERT_TRUE(waitFor([&] { return lab.one->stats().open_connections == 0; }));
  lab.two->setCertificate(Lab::kServerUri, lab.authority.issue(Lab::kServerUri));
  ASSERT_TRUE(waitFor([&] { return lab.one->stats().handshakes == 1; }));
  EXPECT_TRUE(waitFor([&] { return lab.one->stats().hbone_connections == 0; }));
}

TEST(EngineLife, ATunnelThatIsUsedAgainInTimeStays) {
  Lab lab([](EngineConfig& config) { config.pool_idle = 1000ms; });
  EchoServer echo(lab.server, 8080);
  {
    Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
    ASSERT_TRUE(echoes(near));
  }
  for (int i = 0; i < 500 && lab.one->stats().open_connections > 0; i++) std::this_thread::sleep_for(1ms);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(echoes(near));
  std::this_thread::sleep_for(1500ms);
  Tcp next = connectTo(lab.client, Lab::kServerIp, 8080);
  EXPECT_TRUE(echoes(next));
  EXPECT_EQ(lab.one->stats().handshakes, 1u);
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
