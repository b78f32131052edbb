// The loop contains what throws: in events, timers and tasks, and where the kernel does not watch.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "faults.h"
#include "loop.h"

namespace ebbtide::test {
namespace {

class Throwing final : public Pollable {
 public:
  void onEvents(uint32_t) override { throw std::bad_alloc(); }
  void onFault(const char* what) override {
    faults++;
    said = what;
    if (stubborn-- > 0) throw std::bad_alloc();
  }
  int faults = 0, stubborn = 0;
  std::string said;
};

TEST(LoopFault, AnExceptionEndsOneConnectionOnly) {
  Loop loop;
  std::vector<std::string> told;
  loop.onFault(
      [&](const char* where, const char* what) { told.push_back(std::string(where) + ": " + what); });
  int pair[2];
  ASSERT_EQ(pipe(pair), 0);
  Fd in(pair[0]), out(pair[1]);
  Throwing target;
  loop.add(out.get(), EPOLLOUT, target);
  loop.turn(1000);
  EXPECT_EQ(target.faults, 1);
  EXPECT_EQ(loop.faults(), 1u);
  EXPECT_EQ(told, std::vector<std::string>{"connection: std::bad_alloc"});
  loop.remove(out.get(), target);
}

TEST(LoopFault, AnEndThatThrowsIsTriedAgain) {
  Loop loop;
  Throwing target;
  target.stubborn = 2;
  loop.guard("test", &target, [] { throw std::runtime_error("on purpose"); });
  EXPECT_EQ(target.said, "on purpose");
  for (int i = 0; i < 5; i++) loop.turn(0);
  EXPECT_EQ(target.faults, 3);
}

TEST(LoopFault, AnExceptionOfATimerEndsItsOwnerOnly) {
  Loop loop;
  Throwing owner;
  int fired = 0;
  Timer bad([] { throw std::bad_alloc(); }, &owner), good([&] { fired++; });
  loop.arm(bad, 0);
  loop.arm(good, 0);
  loop.turn(0);
  EXPECT_EQ(owner.faults, 1);
  EXPECT_EQ(fired, 1);
  EXPECT_FALSE(bad.armed());
}

TEST(LoopFault, ATimerOfNobodyIsTriedAgain) {
  Loop loop;
  int calls = 0;
  Timer timer([&] {
    if (++calls < 3) throw 7;  // of any type
  });
  loop.arm(timer, 0);
  for (int i = 0; i < 20 && calls < 3; i++) loop.turn(100);
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(loop.faults(), 2u);
  EXPECT_FALSE(timer.armed());
}

TEST(LoopFault, ATimerThatThereIsNoMemoryForIsNotArmed) {
  std::thread([] {
    pthread_setname_np(pthread_self(), "engine-timers");
    Loop loop;
    int fired = 0, refused = 0;
    std::vector<std::unique_ptr<Timer>> timers;
    for (int i = 0; i < 100; i++) timers.push_back(std::make_unique<Timer>([&] { fired++; }));
    for (auto& timer : timers) {
      faults::failAllocation(1);
      try {
        loop.arm(*timer, 0);
      } catch (const std::bad_alloc&) {
        refused++;
        EXPECT_FALSE(timer->armed());
        timer->cancel();
        faults::failAllocation(0);
        loop.arm(*timer, 0);
      }
      faults::failAllocation(0);
    }
    EXPECT_GT(refused, 3);
    for (size_t i = 0; i < timers.size(); i += 2) timers[i]->cancel();
    loop.turn(0);
    EXPECT_EQ(fired, 50);
  }).join();
}

TEST(LoopFault, TasksThatThrowAreRunAgainInOrderAndInTheEndLeftOut) {
  Loop loop;
  std::string order;
  int failures = 2;
  loop.post([&] {
    if (failures-- > 0) throw std::bad_alloc();
    order += 'a';
  });
  loop.post([] { throw std::bad_alloc(); });
  loop.post([&] { order += 'c'; });
  for (int i = 0; i < 50 && order.size() < 2; i++) loop.turn(100);
  EXPECT_EQ(order, "ac");
  EXPECT_EQ(loop.faults(), 12u);
}

TEST(LoopFault, ADescriptorThatTheKernelDoesNotWatchIsSaid) {
  Loop loop;
  Throwing target;
  Fd file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  loop.add(file.get(), EPOLLIN, target);  // EPERM: nothing to poll about a file
  EXPECT_EQ(target.faults, 0);
  loop.turn(0);
  EXPECT_EQ(target.faults, 1);
  EXPECT_NE(target.said.find("Operation not permitted"), std::string::npos) << target.said;
  EXPECT_EQ(loop.faults(), 1u);
}

}  // namespace
}  // namespace ebbtide::test
