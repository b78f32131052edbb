// HBONE connections of one worker to other nodes, shared by the streams of one source pod to one next hop.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "list.h"
#include "model.h"
#include "tunnel.h"

namespace ebbtide {

class ClientPool;
struct PoolGroup;

// What makes two streams fit into one connection.
struct PoolTarget {
  std::shared_ptr<Pod> pod;  // the source: the connection starts in its network namespace
  std::shared_ptr<const TlsContext> tls;
  SocketAddress next_hop;
  std::vector<std::string> expected_identities;

  bool operator==(const PoolTarget&) const = default;
};

struct PoolTargetHash {
  size_t operator()(const PoolTarget& target) const noexcept;
};

// A stream that wants a connection.
class PoolWaiter {
 public:
  // May open its stream on `tunnel` now.
  virtual void onPoolReady(Tunnel& tunnel) = 0;
  // The connection could not be had; `error` is connect()'s errno or 0.
  virtual void onPoolFailed(Reason reason, const std::string& detail, int error) = 0;
  // Whom an exception of the two ends.
  virtual Faultable& faultable() = 0;

 protected:
  PoolWaiter() : pool_hook_(this) {}
  ~PoolWaiter() { leavePool(); }
  void leavePool();

 private:
  friend class ClientPool;
  friend struct PoolGroup;
  ListHook<PoolWaiter> pool_hook_;
  PoolGroup* group_ = nullptr;
};

class ClientTunnel;

// Connections of one target and the streams that wait for one.
struct PoolGroup : std::enable_shared_from_this<PoolGroup> {
  PoolGroup(Worker& worker, PoolTarget target) : worker(worker), target(std::move(target)) {}
  void serve();
  void fail(Reason reason, const std::string& detail, int error);

  Worker& worker;
  const PoolTarget target;
  std::vector<ClientTunnel*> open;
  unsigned connecting = 0;
  List<PoolWaiter> queue;
  size_t queued = 0;
};

class ClientTunnel final : public Tunnel {
 public:
  ClientTunnel(Worker& worker, std::shared_ptr<PoolGroup> group);
  ~ClientTunnel() override;
  void connect();
  // Streams that may still be opened.
  size_t capacity() const;
  // No new streams; closes when the last one ends.
  void retire();

 private:
  void onConnected(int error) override;
  void onOpen() override;
  void onGoaway() override { leaveGroup(); }
  void onSettings() override;
  void onStreamEnded() override;
  void onEnded(Reason reason, const std::string& detail, bool opened) override;
  void leaveGroup();
  void failConnect(int error);

  std::shared_ptr<PoolGroup> group_;
  bool counted_connecting_ = false, in_group_ = false;
  int connect_error_ = 0;
  Timer idle_timer_, serve_timer_;
};

class ClientPool {
 public:
  explicit ClientPool(Worker& worker) : worker_(worker) {}
  // Answers by one of the waiter's callbacks, perhaps before it returns.
  void acquire(const PoolTarget& target, PoolWaiter& waiter);
  // Connections whose certificate was replaced take no new streams.
  void retireIdentity(const Identity& identity);
  void forget(const PoolTarget& target) { groups_.erase(target); }

 private:
  Worker& worker_;
  std::unordered_map<PoolTarget, std::shared_ptr<PoolGroup>, PoolTargetHash> groups_;
};

}  // namespace ebbtide
