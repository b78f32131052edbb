// Pooled HBONE client connections.
#include "pool.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "worker.h"

namespace ebbtide {
namespace {

constexpr size_t kAssumedPeerStreams = 100;

Reason connectReason(int error) {
  if (error == ECONNREFUSED) return Reason::kConnectRefused;
  return error == ETIMEDOUT ? Reason::kConnectTimeout : Reason::kConnectFailed;
}

}  // namespace

// Pod, next hop and TLS context (a source's identity and the version of its certificate) tell nearly all
// apart.
size_t PoolTargetHash::operator()(const PoolTarget& target) const noexcept {
  size_t hash = std::hash<const void*>{}(target.pod.get());
  const auto mix = [&hash](size_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u + (hash >> 29); };
  mix(std::hash<const void*>{}(target.tls.get()));
  const auto& ip = target.next_hop.ip.bytes;
  mix(std::hash<std::string_view>{}({reinterpret_cast<const char*>(ip.data()), ip.size()}));
  mix(target.next_hop.port);
  return hash;
}

void PoolWaiter::leavePool() {
  if (group_ == nullptr) return;
  group_->queued--;
  group_ = nullptr;
  pool_hook_.unlink();
}

void ClientPool::acquire(const PoolTarget& target, PoolWaiter& waiter) {
  auto found = groups_.find(target);
  if (found == groups_.end()) {
    found = groups_.emplace(target, std::make_shared<PoolGroup>(worker_, target)).first;
  }
  auto keep = found->second;  // serve() may end the group
  keep->queue.pushBack(waiter.pool_hook_);
  keep->queued++;
  waiter.group_ = keep.get();
  keep->serve();
}

void ClientPool::retireIdentity(const Identity& identity) {
  std::vector<ClientTunnel*> old;
  for (auto& [key, group] : groups_) {
    if (group->target.tls->identity() == identity)
      old.insert(old.end(), group->open.begin(), group->open.end());
  }
  for (auto* tunnel : old) worker_.loop.guard("tunnel", tunnel, [tunnel] { tunnel->retire(); });
}

void PoolGroup::serve() {
  for (size_t i = 0; i < open.size() && queued > 0;) {
    ClientTunnel* tunnel = open[i];
    if (tunnel->capacity() == 0) {
      i++;
      continue;
    }
    PoolWaiter* waiter = queue.front();
    waiter->leavePool();
    worker.loop.guard("connection", &waiter->faultable(), [&] { waiter->onPoolReady(*tunnel); });
    if (i < open.size() && open[i] != tunnel) i = 0;  // the list changed under us
  }
  size_t each = std::min<size_t>(worker.config().max_streams_per_connection, kAssumedPeerStreams);
  // One connection at a time a key, and further ones only when more wait than the coming ones will hold.
  if (queued > connecting * each) {
    ClientTunnel* started = nullptr;
    bool made = worker.loop.guard("tunnel", nullptr, [&] {
      auto tunnel = std::make_unique<ClientTunnel>(worker, shared_from_this());
      started = tunnel.get();
      worker.own(std::move(tunnel));
    });
    if (made) {
      worker.loop.guard("tunnel", started, [started] { started->connect(); });
    } else {
      fail(Reason::kInternal, "out of memory", 0);
    }
  }
}

void PoolGroup::fail(Reason reason, const std::string& detail, int error) {
  List<PoolWaiter> failed;
  size_t each = std::min<size_t>(worker.config().max_streams_per_connection, kAssumedPeerStreams);
  // Those that stay have another connection coming.
  size_t count = connecting == 0 ? queued : std::min(queued, each);
  while (count-- > 0) {
    PoolWaiter* waiter = queue.front();
    if (waiter == nullptr) break;
    waiter->leavePool();
    worker.loop.guard("connection", &waiter->faultable(),
                      [&] { waiter->onPoolFailed(reason, detail, error); });
  }
}

ClientTunnel::ClientTunnel(Worker& worker, std::shared_ptr<PoolGroup> group)
    : Tunnel(worker, group->target.pod, false),
      group_(std::move(group)),
      idle_timer_(
          [this] {
            if (streams() == 0) retire();
          },
          this),
      serve_timer_([this] { group_->serve(); }, this) {
  group_->connecting++;
  counted_connecting_ = true;
}

ClientTunnel::~ClientTunnel() {
  if (counted_connecting_) group_->connecting--;  // it never began
}

void ClientTunnel::connect() {
  auto [fd, error] = worker_.dialFrom(*pod_, group_->target.next_hop, std::nullopt);
  if (fd) {
    adopt(std::move(fd), true);
    return;
  }
  failConnect(error);
}

void ClientTunnel::failConnect(int error) {
  connect_error_ = error;
  std::string detail = "connect to " + group_->target.next_hop.toString() + ": " + std::strerror(error);
  close(connectReason(error), detail);
}

void ClientTunnel::onConnected(int error) {
  if (error != 0) {
    failConnect(error);
    return;
  }
  tls_.peer().expected = group_->target.expected_identities;
  startTls(group_->target.tls);
}

void ClientTunnel::onOpen() {
  group_->connecting--;
  counted_connecting_ = false;
  in_group_ = true;
  group_->open.push_back(this);
  group_->serve();
  // Those that wanted it may have left meanwhile.
  if (in_group_ && streams() == 0) worker_.loop.arm(idle_timer_, worker_.poolIdleUs());
}

size_t ClientTunnel::capacity() const {
  if (closed() || going_away_ || !in_group_) return 0;
  size_t limit =
      std::min<size_t>(worker_.config().max_streams_per_connection,
                       nghttp2_session_get_remote_settings(h2_, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS));
  return streams() < limit ? limit - streams() : 0;
}

void ClientTunnel::onSettings() {
  worker_.loop.arm(serve_timer_, 0);
}

void ClientTunnel::onStreamEnded() {
  if (going_away_ || closed()) return;
  if (streams() == 0) worker_.loop.arm(idle_timer_, worker_.poolIdleUs());
  if (group_->queued > 0) worker_.loop.arm(serve_timer_, 0);
}

void ClientTunnel::retire() {
  leaveGroup();
  if (streams() > 0) {
    going_away_ = true;
    return;
  }
  close(Reason::kNone, "");
}

void ClientTunnel::leaveGroup() {
  if (!in_group_) return;
  in_group_ = false;
  idle_timer_.cancel();
  std::erase(group_->open, this);
  if (group_->queued > 0) {
    group_->serve();
  } else if (group_->open.empty() && group_->connecting == 0) {
    worker_.pool.forget(group_->target);
  }
}

void ClientTunnel::onEnded(Reason reason, const std::string& detail, bool opened) {
  serve_timer_.cancel();
  idle_timer_.cancel();
  if (counted_connecting_) {
    counted_connecting_ = false;
    group_->connecting--;
    if (!opened) {
      if (connect_error_ == 0) worker_.stats.handshake_failures.fetch_add(1, std::memory_order_relaxed);
      group_->fail(reason, detail, connect_error_);
      if (group_->queued == 0 && group_->open.empty() && group_->connecting == 0)
        worker_.pool.forget(group_->target);
    }
  }
  leaveGroup();
  worker_.disown(*this);
}

}  // namespace ebbtide
