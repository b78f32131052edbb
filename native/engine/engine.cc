// The engine's outer side: commands of the controlling thread, turned into messages to the workers.
#include "engine.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <future>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "worker.h"

namespace ebbtide {
namespace {

bool sameNamespace(int one, int other) {
  struct stat a{}, b{};
  return fstat(one, &a) == 0 && fstat(other, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

PodListeners openListeners(bool reuse_port, bool& kept) {
  auto open = [&](uint16_t port) {
    Listener listener = openListener(port, reuse_port);
    if (listener.kept_port) kept = true;
    return std::move(listener.fd);
  };
  PodListeners listeners;
  listeners.outbound = open(kOutboundPort);
  if (kept && !reuse_port) return listeners;
  listeners.plaintext = open(kPlaintextPort);
  listeners.hbone = open(kHbonePort);
  return listeners;
}

// In a thread of its own, which ends with the namespace it entered.
std::vector<PodListeners> openInNamespace(int netns, size_t sets, bool& claims) {
  std::vector<PodListeners> all;
  std::exception_ptr failure;
  std::thread opener([&] {
    try {
      if (setns(netns, CLONE_NEWNET) != 0) {
        throw std::runtime_error(std::string("cannot enter the pod's network namespace: ") +
                                 std::strerror(errno));
      }
      // Without SO_REUSEPORT first: a capture program then gives each listener a port of its own. A port that
      // stays what was asked for means fixed ports, which the workers share by SO_REUSEPORT.
      bool kept = false;
      all.push_back(openListeners(false, kept));
      claims = !kept;
      if (kept) all.clear();
      while (all.size() < sets) all.push_back(openListeners(kept, kept));
    } catch (...) {
      failure = std::current_exception();
    }
  });
  opener.join();
  if (failure) std::rethrow_exception(failure);
  return all;
}

}  // namespace

struct Engine::Impl {
  Impl(EngineConfig config, EngineEvents& events) : shared(config, events) {
    unsigned count = std::clamp(config.workers, 1u, 16u);  // the capture program has 16 slots a role
    for (unsigned i = 0; i < count; i++) workers.push_back(std::make_unique<Worker>(shared, i));
  }

  void broadcast(const std::function<void(Worker&)>& task) {
    for (auto& worker : workers) {
      Worker* target = worker.get();
      target->post([task, target] { task(*target); });
    }
  }

  // Waits until all workers ran it; not at all for workers that stopped.
  void broadcastAndWait(const std::function<void(Worker&)>& task) const {
    if (!running) return;
    struct Done {
      std::promise<void> promise;
      ~Done() { promise.set_value(); }  // also when a stopping worker drops its mailbox
    };
    std::vector<std::future<void>> all;
    for (auto& worker : workers) {
      auto done = std::make_shared<Done>();
      all.push_back(done->promise.get_future());
      Worker* target = worker.get();
      target->post([task, target, done] { task(*target); });
    }
    for (auto& each : all) each.wait();
  }

  Shared shared;
  std::vector<std::unique_ptr<Worker>> workers;
  std::unordered_map<std::string, PodPtr> pods;
  bool running = false, draining = false, stopped = false;
};

Engine::Engine(EngineConfig config, EngineEvents& events)
    : impl_(std::make_unique<Impl>(std::move(config), events)) {}

Engine::~Engine() {
  stopNow();
}

void Engine::start() {
  if (impl_->running || impl_->stopped) return;
  impl_->running = true;
  for (auto& worker : impl_->workers) worker->start();
}

void Engine::addPod(LocalPod local) {
  Fd netns(local.netns_fd);
  auto found = impl_->pods.find(local.uid);
  if (found != impl_->pods.end()) {
    if (sameNamespace(found->second->netns.get(), netns.get())) return;
  }
  // Listeners of ours would take connections from another proxy's, and end them soon after.
  if (impl_->draining) throw std::runtime_error("the engine is draining and takes no more pods");
  removePod(local.uid);
  auto pod = std::make_shared<Pod>(impl_->shared.budget);
  pod->uid = std::move(local.uid);
  pod->name = std::move(local.name);
  pod->ns = std::move(local.ns);
  pod->service_account = std::move(local.service_account);
  pod->netns = std::move(netns);
  auto listeners = openInNamespace(pod->netns.get(), impl_->workers.size(), pod->claims);
  impl_->pods[pod->uid] = pod;
  for (size_t i = 0; i < impl_->workers.size(); i++) {
    Worker* worker = impl_->workers[i].get();
    auto set = std::make_shared<PodListeners>(std::move(listeners[i]));
    worker->post([worker, pod, set] { worker->addPod(pod, *set); });
  }
}

void Engine::removePod(const std::string& uid) {
  if (impl_->pods.erase(uid) == 0) return;
  // Waits, so that the namespace is free of us when this returns.
  impl_->broadcastAndWait([uid](Worker& worker) { worker.removePod(uid); });
}

void Engine::setCertificate(const std::string& identity, const CertificateBundle& bundle) {
  auto parsed = Identity::parse(identity);
  if (!parsed) throw std::runtime_error("not a SPIFFE identity: " + identity);
  TlsContext check(*parsed, bundle);  // throws on what the workers could not use
  auto shared = std::make_shared<const CertificateBundle>(bundle);
  impl_->broadcast([parsed, shared](Worker& worker) { worker.setCertificate(*parsed, shared); });
}

void Engine::removeCertificate(const std::string& identity) {
  auto parsed = Identity::parse(identity);
  if (parsed) impl_->broadcast([parsed](Worker& worker) { worker.removeCertificate(*parsed); });
}

void Engine::apply(StateDelta delta) {
  bool authorize_again = impl_->shared.state.apply(std::move(delta));
  impl_->broadcast([authorize_again](Worker& worker) { worker.stateChanged(authorize_again); });
}

std::vector<TrafficSample> Engine::traffic() const {
  std::vector<TrafficSample> samples;
  for (auto& worker : impl_->workers) worker->traffic.read(samples);
  return samples;
}

std::vector<ConnectionInfo> Engine::connections() const {
  auto all = std::make_shared<std::pair<std::mutex, std::vector<ConnectionInfo>>>();
  impl_->broadcastAndWait([all](Worker& worker) {
    std::vector<ConnectionInfo> own;
    worker.listConnections(own);
    std::lock_guard lock(all->first);
    std::move(own.begin(), own.end(), std::back_inserter(all->second));
  });
  return std::move(all->second);
}

EngineStats Engine::stats() const {
  EngineStats total;
  for (auto& worker : impl_->workers) {
    auto& one = worker->stats;
    total.open_connections += one.open_connections.load(std::memory_order_relaxed);
    total.hbone_connections += one.hbone_connections.load(std::memory_order_relaxed);
    total.handshakes += one.handshakes.load(std::memory_order_relaxed);
    total.handshake_failures += one.handshake_failures.load(std::memory_order_relaxed);
    total.access_records_dropped += one.access_records_dropped.load(std::memory_order_relaxed);
    total.faults += worker->loop.faults();
  }
  total.buffered_bytes = impl_->shared.budget.used();
  return total;
}

void Engine::drain(std::chrono::milliseconds deadline, std::function<void()> done) {
  if (!impl_->running) {
    done();
    return;
  }
  // Goes when the last worker lets go of it, be it with a message that a stopping worker never read.
  struct Told {
    std::function<void()> done;
    ~Told() { done(); }
  };
  auto told = std::make_shared<Told>();
  told->done = std::move(done);
  impl_->draining = true;
  auto deadline_us = static_cast<uint64_t>(deadline.count()) * 1000;
  impl_->broadcast([told, deadline_us](Worker& worker) { worker.drain(deadline_us, [told] {}); });
}

void Engine::stopNow() {
  if (!impl_ || impl_->stopped) return;
  impl_->stopped = true;
  impl_->running = false;
  for (auto& worker : impl_->workers) worker->stop();
  impl_->pods.clear();
}

const State& Engine::state() const {
  return impl_->shared.state;
}

}  // namespace ebbtide
