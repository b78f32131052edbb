// An application that sends back what it gets.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "lab.h"

namespace ebbtide::test {

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

inline bool echoes(Tcp& connection) {
  return connection.send("e") && connection.receive(1) == "e";
}

}  // namespace ebbtide::test
