// Turns what is known of a connection into Istio's labels, once per kind of connection, and counts.
#include "telemetry.h"

#include <mutex>

namespace ebbtide {

namespace {

const std::string kUnknown = "unknown";

const std::string& orUnknown(const std::string& text) {
  return text.empty() ? kUnknown : text;
}

struct WorkloadLabels {
  std::string workload = kUnknown, service = kUnknown, revision = kUnknown, ns = kUnknown, cluster = kUnknown,
              region = kUnknown, zone = kUnknown;

  explicit WorkloadLabels(const Workload* w) {
    if (w == nullptr) return;
    workload = orUnknown(w->workload_name);
    service = orUnknown(w->canonical_name);
    revision = orUnknown(w->canonical_revision);
    ns = orUnknown(w->ns);
    cluster = orUnknown(w->cluster_id);
    region = orUnknown(w->locality.region);
    zone = orUnknown(w->locality.zone);
  }
};

// In the order of labelNames().
std::vector<std::string> valuesOf(const TrafficLabels& labels) {
  const WorkloadLabels s(labels.source.get()), d(labels.destination.get());
  const Service* service = labels.service.get();
  return {
      labels.reporter == Reporter::kSource ? "source" : "destination",
      s.workload,
      s.service,
      s.revision,
      s.ns,
      orUnknown(labels.source_principal),
      s.service,
      s.revision,
      s.cluster,
      service != nullptr ? orUnknown(service->hostname) : kUnknown,
      service != nullptr ? orUnknown(service->ns) : kUnknown,
      service != nullptr ? orUnknown(service->name) : kUnknown,
      d.workload,
      d.service,
      d.revision,
      d.ns,
      orUnknown(labels.destination_principal),
      d.service,
      d.revision,
      d.cluster,
      "tcp",
      reasonResponseFlag(labels.reason),
      labels.mutual_tls ? "mutual_tls" : kUnknown,
      s.region,
      s.zone,
      d.region,
      d.zone,
  };
}

// Past the bound: no workload, no principal, so only a handful of these can exist.
TrafficLabels overflowOf(const TrafficLabels& labels) {
  TrafficLabels overflow;
  overflow.reporter = labels.reporter;
  overflow.mutual_tls = labels.mutual_tls;
  overflow.reason = labels.reason;
  return overflow;
}

std::string joined(const std::vector<std::string>& values) {
  std::string key;
  for (const std::string& value : values) {
    key += value;
    key += '\x1f';
  }
  return key;
}

}  // namespace

const std::vector<std::string>& TrafficCounters::labelNames() {
  static const std::vector<std::string> names = {
      "reporter",
      "source_workload",
      "source_canonical_service",
      "source_canonical_revision",
      "source_workload_namespace",
      "source_principal",
      "source_app",
      "source_version",
      "source_cluster",
      "destination_service",
      "destination_service_namespace",
      "destination_service_name",
      "destination_workload",
      "destination_canonical_service",
      "destination_canonical_revision",
      "destination_workload_namespace",
      "destination_principal",
      "destination_app",
      "destination_version",
      "destination_cluster",
      "request_protocol",
      "response_flags",
      "connection_security_policy",
      "source_region",
      "source_zone",
      "destination_region",
      "destination_zone",
  };
  return names;
}

size_t TrafficCounters::LabelsHash::operator()(const TrafficLabels& l) const noexcept {
  size_t h =
      static_cast<size_t>(l.reporter) * 2 + (l.mutual_tls ? 1 : 0) + (static_cast<size_t>(l.reason) << 8);
  const auto mix = [&h](size_t value) { h = (h ^ value) * 0x9e3779b97f4a7c15u + (h >> 29); };
  mix(std::hash<const void*>{}(l.source.get()));
  mix(std::hash<const void*>{}(l.destination.get()));
  mix(std::hash<const void*>{}(l.service.get()));
  mix(std::hash<std::string>{}(l.source_principal));
  mix(std::hash<std::string>{}(l.destination_principal));
  return h;
}

bool TrafficCounters::LabelsEqual::operator()(const TrafficLabels& a, const TrafficLabels& b) const noexcept {
  return a.reporter == b.reporter && a.mutual_tls == b.mutual_tls && a.reason == b.reason &&
         a.source == b.source && a.destination == b.destination && a.service == b.service &&
         a.source_principal == b.source_principal && a.destination_principal == b.destination_principal;
}

TrafficSeries* TrafficCounters::series(const TrafficLabels& labels) {
  if (const auto hit = recent_.find(labels); hit != recent_.end()) return hit->second;
  TrafficSeries* found = seriesOf(labels);
  // The cache keeps old versions of workloads alive, so it starts anew now and then.
  if (recent_.size() >= kMaxRecent) recent_.clear();
  recent_.emplace(labels, found);
  return found;
}

TrafficSeries* TrafficCounters::seriesOf(const TrafficLabels& labels) {
  std::vector<std::string> values = valuesOf(labels);
  std::string key = joined(values);
  // Only this thread adds, so it may look without the lock.
  if (const auto known = series_.find(key); known != series_.end()) return &known->second->second;
  if (series_.size() >= kMaxSeries) {
    values = valuesOf(overflowOf(labels));
    key = joined(values);
    if (const auto known = series_.find(key); known != series_.end()) return &known->second->second;
  }
  auto fresh = std::make_unique<std::pair<std::vector<std::string>, TrafficSeries>>();
  fresh->first = std::move(values);
  TrafficSeries* series = &fresh->second;
  const std::lock_guard lock(mutex_);
  series_.emplace(std::move(key), std::move(fresh));
  return series;
}

void TrafficCounters::read(std::vector<TrafficSample>& out) const {
  constexpr auto relaxed = std::memory_order_relaxed;
  const std::lock_guard lock(mutex_);
  out.reserve(out.size() + series_.size());
  for (const auto& [key, entry] : series_) {
    const TrafficSeries& s = entry->second;
    out.push_back({entry->first, s.opened.load(relaxed), s.closed.load(relaxed), s.failed.load(relaxed),
                   s.received_bytes.load(relaxed), s.sent_bytes.load(relaxed)});
  }
}

}  // namespace ebbtide
