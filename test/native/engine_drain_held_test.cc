// Draining of a worker that is busy: what waits meanwhile, at its listeners and in its mailbox.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "drained.h"
#include "echo.h"
#include "lab.h"

namespace ebbtide::test {
namespace {

using namespace std::chrono_literals;

// Holds a worker where it asks for a certificate: what comes meanwhile is found all at once.
class Holding final : public EngineEvents {
 public:
  void onAccess(std::vector<AccessRecord>) override {}
  void onFault(const char*, const char*) override {}
  void onCertificateNeeded(const std::string&) override {
    std::unique_lock lock(mutex_);
    held_++;
    changed_.notify_all();
    changed_.wait(lock, [this] { return released_ >= held_; });
  }
  // Until the worker is held for the n-th time.
  bool held(int n) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, 20s, [&] { return held_ >= n; });
  }
  void release(int n = 1) {
    std::lock_guard lock(mutex_);
    released_ += n;
    changed_.notify_all();
  }
  void releaseAll() { release(1'000'000); }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int held_ = 0, released_ = 0;
};

// The client's pod with an engine whose worker is held by the first connection.
class EngineDrainHeld : public testing::Test {
 protected:
  void SetUp() override {
    lab.one->removePod("client-uid");
    EngineConfig config;
    config.workers = 1;
    config.state.node_name = "one";
    config.state.cluster_id = "Kubernetes";
    config.local_workload_timeout = 60s;
    engine = std::make_unique<Engine>(config, events);
    engine->start();
    StateDelta delta;
    delta.workloads = {lab.workload("client", Lab::kClientIp, "one"),
                       lab.workload("server", Lab::kServerIp, "two")};
    engine->apply(delta);
    engine->addPod({"client-uid", "client", "default", "client", lab.client.duplicate()});
    first = connectTo(lab.client, Lab::kServerIp, 8080);
    ASSERT_TRUE(first);
    ASSERT_TRUE(events.held(1));
  }
  void TearDown() override {
    events.releaseAll();
    if (engine) engine->stopNow();
  }
  void connectMore(int n) {
    for (int i = 0; i < n; i++) {
      more.push_back(connectTo(lab.client, Lab::kServerIp, 8080));
      ASSERT_TRUE(more.back());
    }
  }

  Lab lab;
  Holding events;
  Drained drained;
  std::unique_ptr<Engine> engine;
  Tcp first;
  std::vector<Tcp> more;
};

// More than two turns accept, so that the last are taken when the listeners are closed.
TEST_F(EngineDrainHeld, ADeadlineThatIsOverAtOnceCutsTheLastConnectionsToo) {
  connectMore(200);
  engine->drain(0ms, drained.callback());
  events.releaseAll();
  EXPECT_TRUE(drained.within(10s));
  EXPECT_EQ(engine->stats().open_connections, 0u);
  EXPECT_TRUE(first.isReset());
  for (auto& each : more) EXPECT_TRUE(each.isReset());
}

// A worker that was busy while the listeners' time passed.
TEST_F(EngineDrainHeld, TheWholeBacklogIsTakenBeforeListenersAreClosed) {
  connectMore(300);
  std::this_thread::sleep_for(1200ms);  // then it asks for the certificate again, and is held again
  engine->drain(60s, drained.callback());
  events.release();
  ASSERT_TRUE(events.held(2));
  std::this_thread::sleep_for(200ms);
  events.releaseAll();
  EXPECT_FALSE(drained.within(300ms));
  EXPECT_EQ(engine->stats().open_connections, 301u);
  first.abort();
  for (auto& each : more) each.abort();
  EXPECT_TRUE(drained.within(10s));
}

// Between the beginning and the end of the listeners: a SYN is lost, and the next one is the successor's.
TEST_F(EngineDrainHeld, WhoComesTooLateIsTheSuccessors) {
  EchoServer echo(lab.server, 8080);
  connectMore(200);
  engine->drain(60s, drained.callback());
  for (int n = 1; n <= 2; n++) {
    std::this_thread::sleep_for(1200ms);  // each turn asks for the certificate again
    events.release();
    ASSERT_TRUE(events.held(n + 1));
  }
  int fd = -1;
  lab.client.within([&] { fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); });
  Tcp late(fd);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(8080);
  inet_pton(AF_INET, Lab::kServerIp, &to.sin_addr);
  ASSERT_NE(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  pollfd ready{fd, POLLOUT, 0};
  EXPECT_EQ(poll(&ready, 1, 200), 0) << "neither taken nor refused";
  lab.one->addPod({"client-uid", "client", "default", "client", lab.client.duplicate()});
  events.releaseAll();
  EXPECT_EQ(poll(&ready, 1, 10'000), 1);
  fcntl(fd, F_SETFL, 0);
  EXPECT_TRUE(echoes(late));
  EXPECT_EQ(lab.one->stats().open_connections, 1u);
}

TEST_F(EngineDrainHeld, StoppingEndsADrainThatNoWorkerHasSeen) {
  engine->drain(60s, drained.callback());
  std::thread stopper([this] { engine->stopNow(); });
  std::this_thread::sleep_for(200ms);
  events.releaseAll();
  stopper.join();
  EXPECT_EQ(drained.times(), 1);
}

}  // namespace
}  // namespace ebbtide::test
