// Traffic counters by Istio's label set. One TrafficCounters per worker: only its worker adds, any thread may
// read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "model.h"
#include "reason.h"
#include "state.h"

namespace ebbtide {

enum class Reporter : uint8_t { kSource, kDestination };

// What the labels of a connection follow from. Null workloads become "unknown".
struct TrafficLabels {
  Reporter reporter = Reporter::kSource;
  WorkloadPtr source, destination;
  ServicePtr service;
  std::string source_principal, destination_principal;  // SPIFFE URIs, "" unless mutual TLS
  bool mutual_tls = false;
  Reason reason = Reason::kNone;  // gives response_flags; of failed connections only
};

// One time series set; relaxed atomics, added to by one worker.
struct TrafficSeries {
  std::atomic<uint64_t> opened{0}, closed{0}, failed{0};
  std::atomic<uint64_t> received_bytes{0},
      sent_bytes{0};  // received: from the client side, sent: to the client side
};

// A read-out, labels as Istio names them, in the order of labelNames().
struct TrafficSample {
  std::vector<std::string> labels;
  uint64_t opened, closed, failed, received_bytes, sent_bytes;
};

class TrafficCounters {
 public:
  // Owner worker. The pointer stays valid as long as the TrafficCounters. Series are bounded (kMaxSeries):
  // past that, an overflow series with all workloads "unknown" is returned.
  TrafficSeries* series(const TrafficLabels& labels);
  // Any thread.
  void read(std::vector<TrafficSample>& out) const;
  static const std::vector<std::string>& labelNames();
  static constexpr size_t kMaxSeries = 20000;

 private:
  // Compares workloads and services by pointer: a new version of a workload is looked up once more.
  struct LabelsHash {
    size_t operator()(const TrafficLabels& labels) const noexcept;
  };
  struct LabelsEqual {
    bool operator()(const TrafficLabels& a, const TrafficLabels& b) const noexcept;
  };
  static constexpr size_t kMaxRecent = 4096;

  TrafficSeries* seriesOf(const TrafficLabels& labels);

  // Owner worker only: what series() answered lately, so that a connection does not build its labels' text.
  std::unordered_map<TrafficLabels, TrafficSeries*, LabelsHash, LabelsEqual> recent_;
  mutable std::mutex mutex_;  // guards the map's shape, not the counters
  std::unordered_map<std::string, std::unique_ptr<std::pair<std::vector<std::string>, TrafficSeries>>>
      series_;
};

}  // namespace ebbtide
