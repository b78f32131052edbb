// One thread of the engine: its loop, its share of every pod's listeners, its tunnels, connections and
// counters. Nothing of it is shared with other workers; other threads reach it through post().
#pragma once

#include <atomic>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "flow.h"
#include "handshakes.h"
#include "inbound.h"
#include "outbound.h"
#include "pod.h"
#include "pool.h"
#include "tls_context.h"
#include "waiter.h"

namespace ebbtide {

// What the workers of one engine have in common.
struct Shared {
  Shared(const EngineConfig& config, EngineEvents& events)
      : config(config),
        events(events),
        state(config.state),
        budget(config.max_buffered),
        max_descriptors(descriptorLimit(config)) {}
  static uint32_t descriptorLimit(const EngineConfig& config);

  const EngineConfig config;
  EngineEvents& events;
  State state;
  BufferBudget budget;
  // Descriptors of connections. A pod may hold three times as many as are left free: one pod alone gets three
  // quarters of them, and there are always some for the next.
  const uint32_t max_descriptors;
  std::atomic<uint32_t> descriptors{0};
};

// A worker's gauges; written by it, read by any thread.
struct WorkerStats {
  std::atomic<uint64_t> open_connections{0}, hbone_connections{0}, handshakes{0}, handshake_failures{0};
  std::atomic<uint64_t> access_records_dropped{0};
};

class Acceptor;

class Worker {
 public:
  Worker(Shared& shared, unsigned index);
  ~Worker();

  // ---- any thread ----
  void start();
  // Closes everything without further records, and joins. Idempotent.
  void stop();
  bool post(std::function<void()> task) { return loop.post(std::move(task)); }

  // ---- the worker's thread ----
  // Takes the descriptors out of `listeners`, which it may be given again after an exception.
  void addPod(const PodPtr& pod, PodListeners& listeners);
  void removePod(const std::string& uid);
  void setCertificate(const Identity& identity, std::shared_ptr<const CertificateBundle> bundle);
  void removeCertificate(const Identity& identity);
  void stateChanged(bool authorize_again);
  void drain(uint64_t deadline_us, std::function<void()> done);
  void listConnections(std::vector<ConnectionInfo>& out);

  void accept(Acceptor& acceptor, Fd fd);
  WorkloadPtr localWorkload(const Pod& pod) const;
  // Null until the certificate is there; asks for it. Throws for want of memory.
  std::shared_ptr<const TlsContext> tls(const Identity& identity);
  // Calls the waiter once when workloads or certificates change. It keeps its own deadline.
  void wait(Waiter& waiter) { waiters_.pushBack(waiter.waiter_hook_); }
  // Of the `baggage` field; built once a version of the workload.
  const std::string& baggage(const WorkloadPtr& workload);
  DialResult dialFrom(const Pod& pod, const SocketAddress& to, const std::optional<SocketAddress>& claim);

  // The descriptors of one connection, from its construction to its destruction.
  void hold(Pod& pod, uint32_t n);
  void release(Pod& pod, uint32_t n);
  // Whether the pod may have further connections.
  bool admits(const Pod& pod) const;
  // Out of descriptors: takes one connection with the spare one, and resets it. False: there was none.
  bool shed(int listener);
  // Buffers are used up: cuts connections whose application does not read, but for `needy`, of pods that hold
  // too much.
  void relieve(const SocketEnd& needy);

  void own(std::unique_ptr<Tunnel> tunnel);
  void disown(Tunnel& tunnel);  // disposes of it
  void record(AccessRecord record) noexcept;
  // A refused connection that never became a flow.
  void recordFailure(AccessRecord record) noexcept;
  void flowEnded() { ended_since_trim_++; }
  std::unique_ptr<std::vector<iovec>> takeSlices();
  void giveSlices(std::unique_ptr<std::vector<iovec>> slices);
  void randomBytes(uint8_t* out, size_t n);

  const EngineConfig& config() const { return shared_.config; }
  const State& state() const { return shared_.state; }
  uint64_t connectTimeoutUs() const { return toUs(config().connect_timeout); }
  uint64_t tlsTimeoutUs() const { return toUs(config().tls_timeout); }
  uint64_t answerTimeoutUs() const { return toUs(config().connect_response_timeout); }
  uint64_t localTimeoutUs() const { return toUs(config().local_workload_timeout); }
  uint64_t poolIdleUs() const { return toUs(config().pool_idle); }
  uint64_t pingIntervalUs() const { return toUs(config().ping_interval); }
  uint64_t pingTimeoutUs() const { return toUs(config().ping_timeout); }
  // How many unfinished handshakes a pod may have with one worker.
  uint32_t handshakePlaces() const;

  // A tunnel's bytes as they came, decrypted in place; and one application's bytes.
  const std::unique_ptr<uint8_t[]> receive_buffer, application_buffer;

  Loop loop;
  BlockPool blocks;
  ClientPool pool;
  TrafficCounters traffic;
  WorkerStats stats;
  List<Flow> flows;
  List<Tunnel> dirty_tunnels;
  List<SocketEnd> waiting_ends;  // for whose applications bytes wait, the longest stalled first

 private:
  struct Certificate {
    std::shared_ptr<const CertificateBundle> bundle;
    std::shared_ptr<const TlsContext> context;  // made at first use
  };
  struct WorkerPod {
    PodPtr pod;
    std::vector<std::unique_ptr<Acceptor>> acceptors;
  };

  static uint64_t toUs(std::chrono::milliseconds time) { return static_cast<uint64_t>(time.count()) * 1000; }
  void run();
  void endTurn();
  void closeAll();
  void wakeWaiters();
  void refuse(const Acceptor& acceptor, Fd fd, const char* detail);
  void checkDrained();
  void closeListeners();
  void drainTunnels();
  void giveRecords();
  void trimMemory();

  Shared& shared_;
  const unsigned index_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};
  std::unique_ptr<ThreadNamespace> namespace_;
  std::unordered_map<std::string, WorkerPod> pods_;
  std::unordered_map<std::string, Certificate> certificates_;  // by SPIFFE URI
  std::unordered_map<std::string, uint64_t> asked_us_;         // certificate requests, to ask once a second
  std::unordered_map<Tunnel*, std::unique_ptr<Tunnel>> tunnels_;
  std::unordered_map<WorkloadPtr, std::string> baggage_;
  List<Waiter> waiters_;
  std::vector<AccessRecord> records_;
  std::vector<std::unique_ptr<std::vector<iovec>>> free_slices_;
  bool draining_ = false, silent_ = false;
  std::function<void()> drained_;
  Timer drain_timer_, listeners_timer_;
  uint64_t records_given_us_ = 0;
  Timer records_timer_;
  uint64_t ended_since_trim_ = 0;
  Timer trim_timer_;
  uint64_t random_[2];
  Fd spare_;
};

// A listening socket of one role.
class Acceptor final : public Pollable {
 public:
  enum class Role : uint8_t { kOutbound, kPlaintext, kHbone };
  Acceptor(Worker& worker, PodPtr pod, Role role, Fd fd);
  ~Acceptor();
  void onEvents(uint32_t events) override;
  void onFault(const char* what) override;
  const PodPtr& pod() const { return pod_; }
  Role role() const { return role_; }
  // HBONE only; outlived by the connections that it began.
  const std::shared_ptr<Handshakes>& handshakes() const { return handshakes_; }
  // From here on a SYN is lost, and sent again a second later, when another proxy's listener may be found;
  // handshakes that have begun are finished.
  void refuseNew();
  // Before it is closed: whatever the backlog holds.
  void acceptRest();

 private:
  // A bounded number; whether there may be more.
  bool acceptSome();
  void pause();

  Worker& worker_;
  PodPtr pod_;
  Role role_;
  std::shared_ptr<Handshakes> handshakes_;
  Fd fd_;
  Timer pause_;
  bool refuses_ = false;
};

}  // namespace ebbtide
