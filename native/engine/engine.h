// The engine as the binding sees it: start, give pods, certificates and mesh state, read counters and events,
// stop. All public functions are called on one thread (JavaScript's) unless they say otherwise.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "reason.h"
#include "state.h"
#include "telemetry.h"

namespace ebbtide {

struct EngineConfig {
  unsigned workers = 2;
  StateConfig state;
  uint32_t stream_window = 4u << 20;       // HTTP2_STREAM_WINDOW_SIZE
  uint32_t connection_window = 16u << 20;  // HTTP2_CONNECTION_WINDOW_SIZE
  uint32_t frame_size = 1u << 20;          // HTTP2_FRAME_SIZE
  unsigned max_streams_per_connection = 100;
  uint64_t max_buffered = 256u << 20;  // bytes for slow applications, see BufferBudget
  uint32_t max_descriptors = 0;        // for connections of all pods; 0: nine tenths of RLIMIT_NOFILE
  std::chrono::milliseconds pool_idle{300'000};
  std::chrono::milliseconds connect_timeout{10'000};
  std::chrono::milliseconds tls_timeout{10'000};
  std::chrono::milliseconds connect_response_timeout{15'000};  // longer than the far side's connect timeout
  std::chrono::milliseconds local_workload_timeout{5'000};     // wait for own workload and certificate
  std::chrono::milliseconds ping_interval{10'000}, ping_timeout{20'000};
};

struct LocalPod {
  std::string uid, name, ns, service_account;
  int netns_fd = -1;  // owned by the engine from addPod on
};

struct CertificateBundle {
  std::string chain_pem;  // leaf first, then intermediates
  std::string key_pem;    // PKCS#8
  std::string roots_pem;  // one or several
};

// A connection that ended or was refused; becomes one access log line.
struct AccessRecord {
  bool inbound = false;
  bool established = false;  // false: refused or failed before bytes could flow
  Reason reason = Reason::kNone;
  std::string detail;  // policy name, TLS error text, errno text
  SocketAddress source, destination;
  std::string
      hbone_address;  // dst.hbone_addr: next hop (outbound) or CONNECT authority (inbound), "" if plain
  WorkloadPtr source_workload, destination_workload;
  ServicePtr service;
  std::string source_identity, destination_identity;  // SPIFFE URIs, "" unless mutual TLS
  uint64_t bytes_sent = 0, bytes_received = 0;        // from the reporter's application's point of view
  uint64_t duration_us = 0;
  std::string trace_id;  // 32 hex of traceparent
};

struct ConnectionInfo {
  bool inbound;
  std::string pod_uid;
  SocketAddress source, destination;
  std::string hbone_address, protocol;  // HBONE | TCP
  std::string peer_identity;
  uint64_t bytes_sent, bytes_received, age_ms;
};

// Gauges and counters that have no Istio labels.
struct EngineStats {
  uint64_t open_connections = 0, hbone_connections = 0, handshakes = 0, handshake_failures = 0;
  uint64_t buffered_bytes = 0, access_records_dropped = 0;
  // Exceptions, and descriptors that the kernel refused to watch: each ended a connection or one attempt of a
  // task.
  uint64_t faults = 0;
};

class EngineEvents {
 public:
  virtual ~EngineEvents() = default;
  // Any worker thread; must not block. The engine batches: a few calls a worker and a tenth of a second.
  virtual void onAccess(std::vector<AccessRecord> records) = 0;
  // Any worker thread. A connection waits for this identity's certificate (SPIFFE URI).
  virtual void onCertificateNeeded(const std::string& identity) = 0;
  // Any worker thread. Something failed inside and was contained: `where` names the kind of work, `what` the
  // error. May come at any rate.
  virtual void onFault(const char* where, const char* what) = 0;
};

class Engine {
 public:
  Engine(EngineConfig config, EngineEvents& events);
  ~Engine();  // stopNow()

  void start();

  // Opens the pod's three listeners per worker in its network namespace. Throws std::runtime_error with errno
  // text. The same uid with the same netns is no change; with another netns the old one is drained at once.
  // Throws too once drain() was called.
  void addPod(LocalPod pod);
  // Closes listeners and connections of the pod. Unknown uid is no error.
  void removePod(const std::string& uid);

  void setCertificate(const std::string& identity, const CertificateBundle& bundle);  // throws on bad PEM
  void removeCertificate(const std::string& identity);

  void apply(StateDelta delta);

  std::vector<TrafficSample> traffic() const;
  std::vector<ConnectionInfo> connections() const;
  EngineStats stats() const;

  // Stops accepting, sends GOAWAY; `done` is called once, on any thread, when the last connection ended, the
  // deadline passed, or stopNow() came first. It must not throw. The engine is then ready for stopNow().
  void drain(std::chrono::milliseconds deadline, std::function<void()> done);
  // Idempotent, joins all threads, safe in atexit and from any JavaScript exit path.
  void stopNow();

  const State& state() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ebbtide
