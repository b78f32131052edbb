// One thread of the engine.
#include "worker.h"

#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "connect_headers.h"

namespace ebbtide {
namespace {

constexpr size_t kMaxRecordsATurn = 4096;
// Records are given away at once after a pause, then gathered: at thousands of connections a second the
// receiving thread wakes twenty times a second instead of once a connection.
constexpr uint64_t kRecordsPauseUs = 50'000;
constexpr size_t kRecordsBatch = 512;
constexpr uint64_t kAskAgainUs = 1'000'000;
// Handshakes that have begun when the listeners are to be closed are finished, and accepted, within this.
constexpr uint64_t kLastHandshakesUs = 50'000;
// After this many connections ended and the worker is idle, freed memory goes back to the system.
constexpr uint64_t kTrimAfter = 500;
constexpr uint64_t kTrimIdleUs = 2'000'000;
// A pod may hold this many times the descriptors that are free.
constexpr uint32_t kPodShare = 3;
constexpr size_t kKeptSlices = 64;
constexpr size_t kMaxBaggage = 1024;
// An application that took nothing for this long may be cut for the sake of others.
constexpr uint64_t kStalledUs = 1'000'000;

std::unique_ptr<uint8_t[]> bytes(size_t n) {
  return std::unique_ptr<uint8_t[]>(new uint8_t[n]);  // not make_unique: untouched pages cost nothing
}

}  // namespace

Worker::Worker(Shared& shared, unsigned index)
    : receive_buffer(bytes(kReceiveBytes)),
      application_buffer(bytes(kTurnBytes + Tunnel::kHeadroom)),
      pool(*this),
      shared_(shared),
      index_(index),
      drain_timer_([this] {
        // A deadline as short as that of the last handshakes: what they bring is cut like the rest.
        if (listeners_timer_.armed()) closeListeners();
        while (Flow* flow = flows.front()) flow->cut(Reason::kDrained, "the proxy is stopping");
        checkDrained();
      }),
      listeners_timer_([this] { closeListeners(); }),
      records_timer_([this] { giveRecords(); }),
      trim_timer_([this] { trimMemory(); }) {
  if (getrandom(random_, sizeof random_, 0) != sizeof random_) random_[0] = monotonicUs();
  random_[0] |= 1;
  spare_ = Fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
  free_slices_.reserve(kKeptSlices);
}

Worker::~Worker() {
  stop();
}

void Worker::start() {
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), ("engine-" + std::to_string(index_)).c_str());
}

void Worker::stop() {
  stopping_ = true;
  if (thread_.joinable()) {
    loop.post([] {});
    thread_.join();
  }
  loop.closeMailbox();
}

void Worker::run() {
  namespace_ = std::make_unique<ThreadNamespace>();
  loop.onFault([this](const char* where, const char* what) { shared_.events.onFault(where, what); });
  bool again = false;
  while (!stopping_) {
    loop.turn(again ? 0 : -1);
    // What an exception leaves over is done with the next turn.
    again = !loop.guard("turn", nullptr, [this] { endTurn(); });
    loop.destroyDisposed();
  }
  closeAll();
}

void Worker::endTurn() {
  // Flushing may make tunnels dirty again only by ending streams; what they add goes out with the next turn's
  // events.
  List<Tunnel> dirty;
  dirty_tunnels.moveTo(dirty);
  while (Tunnel* tunnel = dirty.popFront()) {
    loop.guard("tunnel", tunnel, [tunnel] { tunnel->flush(); });
  }
  if (!dirty_tunnels.empty()) loop.post([] {});
  if (draining_) checkDrained();
  if (!records_.empty() && !records_timer_.armed()) {
    uint64_t passed = loop.nowUs() - records_given_us_;
    if (passed >= kRecordsPauseUs) {
      giveRecords();
    } else {
      loop.arm(records_timer_, kRecordsPauseUs - passed);
    }
  } else if (records_.size() >= kRecordsBatch) {
    giveRecords();
  }
  if (ended_since_trim_ > kTrimAfter && flows.empty() && !trim_timer_.armed())
    loop.arm(trim_timer_, kTrimIdleUs);
}

void Worker::giveRecords() {
  records_timer_.cancel();
  records_given_us_ = loop.nowUs();
  if (records_.empty()) return;
  auto batch = std::move(records_);
  records_.clear();
  size_t count = batch.size();
  bool given = loop.guard("records", nullptr, [&] { shared_.events.onAccess(std::move(batch)); });
  if (!given) stats.access_records_dropped.fetch_add(count, std::memory_order_relaxed);
}

void Worker::closeAll() {
  giveRecords();
  silent_ = true;
  while (Flow* flow = flows.front()) {
    loop.guard("connection", nullptr, [flow] { flow->cut(Reason::kDrained, ""); });
  }
  while (!tunnels_.empty()) tunnels_.begin()->first->close(Reason::kDrained, "");
  pods_.clear();
  loop.destroyDisposed();
  records_.clear();
  if (drained_) loop.guard("drain", nullptr, drained_);
  drained_ = nullptr;
}

void Worker::addPod(const PodPtr& pod, PodListeners& listeners) {
  WorkerPod& entry = pods_[pod->uid];
  entry.pod = pod;
  entry.acceptors.clear();
  entry.acceptors.reserve(3);
  auto listen = [&](Acceptor::Role role, Fd& fd) {
    // A copy, so that nothing is lost when memory is short half way.
    Fd own(fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
    if (!own) throw std::system_error(errno, std::generic_category(), "a listener's descriptor");
    entry.acceptors.push_back(std::make_unique<Acceptor>(*this, pod, role, std::move(own)));
  };
  listen(Acceptor::Role::kOutbound, listeners.outbound);
  listen(Acceptor::Role::kPlaintext, listeners.plaintext);
  listen(Acceptor::Role::kHbone, listeners.hbone);
  listeners = {};
}

void Worker::removePod(const std::string& uid) {
  auto found = pods_.find(uid);
  if (found == pods_.end()) return;
  PodPtr pod = found->second.pod;
  pods_.erase(found);  // messages run after the turn's events: none can name its acceptors any more
  flows.forEach([&](Flow& flow) {
    if (flow.pod() != pod) return;
    loop.guard("connection", &flow, [&flow] { flow.cut(Reason::kDrained, "the pod left the mesh"); });
  });
  // Each ends by leaving the map.
  for (auto at = tunnels_.begin(); at != tunnels_.end();) {
    Tunnel* tunnel = (at++)->first;
    if (tunnel->pod() == pod) tunnel->close(Reason::kDrained, "the pod left the mesh");
  }
  namespace_->leave(pod.get());
}

void Worker::setCertificate(const Identity& identity, std::shared_ptr<const CertificateBundle> bundle) {
  certificates_[identity.uri()] = {std::move(bundle), nullptr};
  asked_us_.erase(identity.uri());
  pool.retireIdentity(identity);
  wakeWaiters();
}

void Worker::removeCertificate(const Identity& identity) {
  certificates_.erase(identity.uri());
  pool.retireIdentity(identity);
}

void Worker::stateChanged(bool authorize_again) {
  if (authorize_again) {
    // What cannot be decided is cut.
    flows.forEach([this](Flow& flow) {
      loop.guard("policy", &flow, [&flow] {
        std::string policy;
        if (!flow.stillAllowed(policy)) flow.cut(Reason::kPolicyChanged, policy);
      });
    });
  }
  wakeWaiters();
}

void Worker::wakeWaiters() {
  List<Waiter> waiting;
  waiters_.moveTo(waiting);
  while (Waiter* waiter = waiting.popFront()) {
    loop.guard("connection", &waiter->faultable(), [waiter] { waiter->onLocalChange(); });
  }
}

void Worker::drain(uint64_t deadline_us, std::function<void()> done) {
  // All that may throw comes before anything is changed, but for the timers: it is begun anew after it did.
  if (drained_) {
    done = [first = drained_, done] {
      first();
      done();
    };
  }
  loop.arm(drain_timer_, deadline_us);
  loop.arm(listeners_timer_, std::min(kLastHandshakesUs, deadline_us));
  drained_ = std::move(done);
  draining_ = true;
  for (auto& [uid, entry] : pods_) {
    for (auto& acceptor : entry.acceptors) acceptor->refuseNew();
  }
  drainTunnels();
}

void Worker::closeListeners() {
  listeners_timer_.cancel();
  for (auto& [uid, entry] : pods_) {
    // What waits in the backlog would be reset.
    for (auto& acceptor : entry.acceptors) acceptor->acceptRest();
    entry.acceptors.clear();
  }
  drainTunnels();
}

void Worker::drainTunnels() {
  // Draining may end a tunnel, which then leaves the map.
  for (auto at = tunnels_.begin(); at != tunnels_.end();) {
    auto* server = dynamic_cast<ServerTunnel*>((at++)->first);
    if (server != nullptr) loop.guard("drain", server, [server] { server->drain(); });
  }
}

void Worker::checkDrained() {
  if (!drained_ || !flows.empty() || listeners_timer_.armed()) return;
  if (drain_timer_.armed()) {
    // New streams may come until every tunnel has its final GOAWAY.
    for (auto& [tunnel, owner] : tunnels_) {
      auto* server = dynamic_cast<ServerTunnel*>(tunnel);
      if (server != nullptr && !server->drained()) return;
    }
    drain_timer_.cancel();
  }
  giveRecords();
  auto done = std::move(drained_);
  drained_ = nullptr;
  done();
}

void Worker::listConnections(std::vector<ConnectionInfo>& out) {
  flows.forEach([&](Flow& flow) { out.push_back(flow.info()); });
}

uint32_t Shared::descriptorLimit(const EngineConfig& config) {
  if (config.max_descriptors != 0) return config.max_descriptors;
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return 1024;
  return static_cast<uint32_t>(std::min<rlim_t>(files.rlim_cur, 4'000'000) / 10 * 9);
}

void Worker::hold(Pod& pod, uint32_t n) {
  pod.descriptors.fetch_add(n, std::memory_order_relaxed);
  shared_.descriptors.fetch_add(n, std::memory_order_relaxed);
}

void Worker::release(Pod& pod, uint32_t n) {
  pod.descriptors.fetch_sub(n, std::memory_order_relaxed);
  shared_.descriptors.fetch_sub(n, std::memory_order_relaxed);
}

bool Worker::admits(const Pod& pod) const {
  uint32_t held = shared_.descriptors.load(std::memory_order_relaxed);
  return held < shared_.max_descriptors &&
         pod.descriptors.load(std::memory_order_relaxed) < kPodShare * (shared_.max_descriptors - held);
}

uint32_t Worker::handshakePlaces() const {
  return std::clamp(shared_.max_descriptors / 16, 16u, 1024u) / std::clamp(config().workers, 1u, 16u);
}

bool Worker::shed(int listener) {
  spare_.reset();
  Fd accepted(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  bool took = static_cast<bool>(accepted);
  if (took) resetOnClose(accepted.get());
  accepted.reset();
  spare_ = Fd(open("/dev/null", O_RDONLY | O_CLOEXEC));
  return took;
}

void Worker::relieve(const SocketEnd& needy) {
  if (loop.nowUs() < kStalledUs) return;
  uint64_t before = loop.nowUs() - kStalledUs;
  auto fits = [&](const SocketEnd& end) {
    return &end != &needy && end.stalledSince(before) && end.budget().exceeded();
  };
  while (SocketEnd* stalled = waiting_ends.find(fits)) {
    loop.guard("connection", stalled, [stalled] { stalled->overflow(); });
  }
}

void Worker::refuse(const Acceptor& acceptor, Fd fd, const char* detail) {
  AccessRecord record;
  record.inbound = acceptor.role() != Acceptor::Role::kOutbound;
  record.reason = Reason::kTooManyConnections;
  record.detail = detail;
  record.source = peerAddress(fd.get()).value_or(SocketAddress{});
  record.destination = originalDestination(fd.get()).value_or(SocketAddress{});
  (record.inbound ? record.destination_workload : record.source_workload) = localWorkload(*acceptor.pod());
  resetOnClose(fd.get());
  recordFailure(std::move(record));
}

void Worker::accept(Acceptor& acceptor, Fd fd) {
  const Pod& pod = *acceptor.pod();
  if (!admits(pod)) {
    refuse(acceptor, std::move(fd), "the pod's share of the proxy's descriptors is used up");
    return;
  }
  switch (acceptor.role()) {
    case Acceptor::Role::kOutbound: {
      auto* flow =
          new OutboundFlow(*this, acceptor.pod(), std::move(fd));  // `flows` owns it until it finishes
      loop.guard("connection", flow, [flow] { flow->begin(); });
      return;
    }
    case Acceptor::Role::kPlaintext: {
      auto* flow = new InboundPlainFlow(*this, acceptor.pod(), std::move(fd));
      loop.guard("connection", flow, [flow] { flow->begin(); });
      return;
    }
    case Acceptor::Role::kHbone: {
      auto tunnel = std::make_unique<ServerTunnel>(*this, acceptor.pod(), acceptor.handshakes());
      ServerTunnel* started = tunnel.get();
      own(std::move(tunnel));
      loop.guard("connection", started, [&] { started->begin(std::move(fd)); });
      return;
    }
  }
}

WorkloadPtr Worker::localWorkload(const Pod& pod) const {
  return state().localWorkload(pod.ns, pod.name, pod.service_account);
}

std::shared_ptr<const TlsContext> Worker::tls(const Identity& identity) {
  std::string uri = identity.uri();
  auto found = certificates_.find(uri);
  if (found == certificates_.end()) {
    uint64_t now = loop.nowUs();
    auto [asked, first] = asked_us_.try_emplace(uri, now);
    if (first || now - asked->second >= kAskAgainUs) {
      asked->second = now;
      shared_.events.onCertificateNeeded(uri);
    }
    return nullptr;
  }
  // Engine::setCertificate() read the same bundle, so only want of memory throws here.
  if (!found->second.context) {
    found->second.context = std::make_shared<TlsContext>(identity, *found->second.bundle);
  }
  return found->second.context;
}

const std::string& Worker::baggage(const WorkloadPtr& workload) {
  if (auto found = baggage_.find(workload); found != baggage_.end()) return found->second;
  if (baggage_.size() >= kMaxBaggage) baggage_.clear();  // old versions of workloads, mostly
  return baggage_.emplace(workload, baggageOf(workload)).first->second;
}

DialResult Worker::dialFrom(const Pod& pod, const SocketAddress& to,
                            const std::optional<SocketAddress>& claim) {
  if (int error = namespace_->enter(&pod, pod.netns.get()); error != 0) return {Fd(), error};
  return dial(to, claim, pod.claims);
}

void Worker::own(std::unique_ptr<Tunnel> tunnel) {
  Tunnel* key = tunnel.get();
  tunnels_.emplace(key, std::move(tunnel));
}

void Worker::disown(Tunnel& tunnel) {
  auto found = tunnels_.find(&tunnel);
  if (found == tunnels_.end()) return;
  loop.dispose(std::move(found->second));
  tunnels_.erase(found);
}

void Worker::record(AccessRecord record) noexcept {
  if (silent_) return;
  bool kept = records_.size() < kMaxRecordsATurn &&
              loop.guard("record", nullptr, [&] { records_.push_back(std::move(record)); });
  if (!kept) stats.access_records_dropped.fetch_add(1, std::memory_order_relaxed);
}

void Worker::recordFailure(AccessRecord record) noexcept {
  loop.guard("record", nullptr, [&] {
    TrafficLabels labels;
    labels.reporter = record.inbound ? Reporter::kDestination : Reporter::kSource;
    labels.source = record.source_workload;
    labels.destination = record.destination_workload;
    labels.reason = record.reason;
    traffic.series(labels)->failed.fetch_add(1, std::memory_order_relaxed);
  });
  this->record(std::move(record));
}

std::unique_ptr<std::vector<iovec>> Worker::takeSlices() {
  if (free_slices_.empty()) return std::make_unique<std::vector<iovec>>();
  auto slices = std::move(free_slices_.back());
  free_slices_.pop_back();
  return slices;
}

void Worker::giveSlices(std::unique_ptr<std::vector<iovec>> slices) {
  slices->clear();
  if (free_slices_.size() < kKeptSlices && slices->capacity() <= 4096)
    free_slices_.push_back(std::move(slices));
}

// xorshift128+: trace ids need to be distinct, not secret.
void Worker::randomBytes(uint8_t* out, size_t n) {
  while (n > 0) {
    uint64_t x = random_[0];
    const uint64_t y = random_[1];
    random_[0] = y;
    x ^= x << 23;
    random_[1] = x ^ y ^ (x >> 17) ^ (y >> 26);
    uint64_t value = random_[1] + y;
    size_t part = std::min(n, sizeof value);
    std::memcpy(out, &value, part);
    out += part;
    n -= part;
  }
}

void Worker::trimMemory() {
  ended_since_trim_ = 0;
  if (!flows.empty()) return;
  blocks.trim();
  free_slices_.clear();
  malloc_trim(0);
}

}  // namespace ebbtide
