// How fast the engine alone carries bytes: two engines in one process, one TCP stream or four, client to
// server.
#include <sys/resource.h>
#include <sys/time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "lab.h"
#include "loop.h"
#include "socket.h"

using namespace ebbtide;
using namespace ebbtide::test;

namespace {

double cpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + time.tv_usec / 1e6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void bulk(Lab& lab, const Tcp& listener, size_t streams, uint64_t bytes) {
  std::vector<Tcp> senders, receivers;
  for (size_t i = 0; i < streams; i++) {
    senders.push_back(connectTo(lab.client, Lab::kServerIp, 9000));
    receivers.push_back(acceptFrom(listener));
  }
  uint64_t start = monotonicUs();
  double cpu = cpuSeconds();
  std::vector<std::thread> threads;
  std::string chunk(128u << 10, 'x');
  for (size_t i = 0; i < streams; i++) {
    threads.emplace_back([&, i] {
      for (uint64_t sent = 0; sent < bytes / streams; sent += chunk.size()) {
        if (!senders[i].send(chunk)) std::abort();
      }
      senders[i].finish();
    });
    threads.emplace_back([&, i] {
      std::string buffer(256u << 10, '\0');
      while (recv(receivers[i].fd(), buffer.data(), buffer.size(), 0) > 0) {
      }
    });
  }
  for (auto& thread : threads) thread.join();
  double seconds = static_cast<double>(monotonicUs() - start) / 1e6;
  std::printf("%zu stream(s): %.2f Gbit/s, %.2f CPU s a wall s\n", streams,
              static_cast<double>(bytes) * 8 / 1e9 / seconds, (cpuSeconds() - cpu) / seconds);
}

void pingPong(Lab& lab, const Tcp& listener, int rounds) {
  Tcp near = connectTo(lab.client, Lab::kServerIp, 9000);
  Tcp far = acceptFrom(listener);
  std::thread echo([&] {
    for (;;) {
      std::string byte = far.receive(1);
      if (byte.empty()) return;
      far.send(byte);
    }
  });
  std::vector<uint64_t> times;
  for (int i = 0; i < rounds; i++) {
    uint64_t start = monotonicUs();
    near.send("x");
    near.receive(1);
    times.push_back(monotonicUs() - start);
  }
  near.finish();
  echo.join();
  std::sort(times.begin(), times.end());
  std::printf("1-byte round trip: p50 %llu us, p99 %llu us\n",
              static_cast<unsigned long long>(times[times.size() / 2]),
              static_cast<unsigned long long>(times[times.size() * 99 / 100]));
}

void connects(Lab& lab, const Tcp& listener, int count) {
  std::thread server([&] {
    for (int i = 0; i < count; i++) acceptFrom(listener).close();
  });
  uint64_t start = monotonicUs();
  lab.client.within([&] {
    sockaddr_storage to{};
    socklen_t length = toSockaddr({*IpAddress::parse(Lab::kServerIp), 9000}, to);
    for (int i = 0; i < count; i++) {
      Tcp connection(socket(AF_INET, SOCK_STREAM, 0));
      if (connect(connection.fd(), reinterpret_cast<sockaddr*>(&to), length) != 0) std::abort();
      connection.receive(1);
    }
  });
  server.join();
  std::printf("connections, one after the other: %.0f a second\n",
              count * 1e6 / static_cast<double>(monotonicUs() - start));
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t gib = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4;
  Lab lab;
  Tcp listener = listenOn(lab.server, 9000);
  bulk(lab, listener, 1, 256u << 20);
  bulk(lab, listener, 1, gib << 30);
  bulk(lab, listener, 4, gib << 30);
  pingPong(lab, listener, 5000);
  connects(lab, listener, 3000);
}
