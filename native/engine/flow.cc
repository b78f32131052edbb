// What all connections share: counting, recording, ending.
#include "flow.h"

#include "worker.h"

namespace ebbtide {
namespace {

// One writer a series: no locked instruction is needed.
void bump(std::atomic<uint64_t>& counter, uint64_t n) {
  counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
}

TrafficLabels labelsOf(const AccessRecord& record, bool mutual_tls) {
  TrafficLabels labels;
  labels.reporter = record.inbound ? Reporter::kDestination : Reporter::kSource;
  labels.source = record.source_workload;
  labels.destination = record.destination_workload;
  labels.service = record.service;
  labels.source_principal = record.source_identity;
  labels.destination_principal = record.destination_identity;
  labels.mutual_tls = mutual_tls;
  return labels;
}

}  // namespace

Flow::Flow(Worker& worker, PodPtr pod, bool inbound, uint32_t descriptors)
    : worker_(worker),
      pod_(std::move(pod)),
      hook_(this),
      started_us_(worker.loop.nowUs()),
      descriptors_(descriptors) {
  worker_.hold(*pod_, descriptors_);
  record_.inbound = inbound;
  worker_.flows.pushBack(hook_);
  worker_.stats.open_connections.fetch_add(1, std::memory_order_relaxed);
}

void Flow::holdDescriptors(uint32_t n) {
  worker_.hold(*pod_, n - descriptors_);
  descriptors_ = n;
}

Flow::~Flow() {
  worker_.release(*pod_, descriptors_);
  if (!finished_) worker_.stats.open_connections.fetch_sub(1, std::memory_order_relaxed);
}

void Flow::establish() {
  series_ = worker_.traffic.series(labelsOf(record_, mutual_tls_));
  record_.established = true;
  bump(series_->opened, 1);
}

void Flow::fromApplication(size_t n) {
  record_.bytes_sent += n;
  if (series_ != nullptr) bump(record_.inbound ? series_->sent_bytes : series_->received_bytes, n);
}

void Flow::toApplication(size_t n) {
  record_.bytes_received += n;
  if (series_ != nullptr) bump(record_.inbound ? series_->received_bytes : series_->sent_bytes, n);
}

void Flow::cut(Reason reason, const std::string& detail) {
  if (finished_) return;
  closeSides();
  finish(reason, detail);
}

void Flow::onFault(const char* what) {
  std::string detail;
  try {
    detail = what;
  } catch (const std::bad_alloc&) {  // then without
  }
  cut(Reason::kInternal, detail);
}

// Nothing in here may leave a flow half finished.
void Flow::finish(Reason reason, const std::string& detail) {
  if (finished_) return;
  finished_ = true;
  hook_.unlink();
  worker_.stats.open_connections.fetch_sub(1, std::memory_order_relaxed);
  worker_.loop.guard("record", nullptr, [&] {
    record_.reason = reason;
    record_.duration_us = monotonicUs() - started_us_;
    record_.detail = detail;
    if (record_.established) {
      bump(series_->closed, 1);
    } else {
      auto labels = labelsOf(record_, mutual_tls_);
      labels.reason = reason;
      bump(worker_.traffic.series(labels)->failed, 1);
    }
  });
  worker_.record(std::move(record_));
  worker_.flowEnded();
  worker_.loop.dispose(std::unique_ptr<Disposable>(this));
}

ConnectionInfo Flow::info() const {
  ConnectionInfo info;
  info.inbound = record_.inbound;
  info.pod_uid = pod_->uid;
  info.source = record_.source;
  info.destination = record_.destination;
  info.hbone_address = record_.hbone_address;
  info.protocol = mutual_tls_ ? "HBONE" : "TCP";
  info.peer_identity = record_.inbound ? record_.source_identity : record_.destination_identity;
  info.bytes_sent = record_.bytes_sent;
  info.bytes_received = record_.bytes_received;
  info.age_ms = (worker_.loop.nowUs() - started_us_) / 1000;
  return info;
}

}  // namespace ebbtide
