// Carries what workers report to JavaScript's thread: queued in bounds, delivered in batches.
#pragma once

#include <napi.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "engine.h"

namespace ebbtide {

// Created, closed and delivering on JavaScript's thread; the EngineEvents functions on any worker.
class EventBridge final : public EngineEvents {
 public:
  // `on_access(array)` gets kFieldsPerRecord values for each record, in a row;
  // `on_certificate_needed(identity)`; `on_fault(where, what, count)`, `count` since the last call, which the
  // first two describe.
  EventBridge(Napi::Env env, Napi::Function on_access, Napi::Function on_certificate_needed,
              Napi::Function on_fault);
  ~EventBridge() override { close(); }

  void onAccess(std::vector<AccessRecord> records) override;
  void onCertificateNeeded(const std::string& identity) override;
  void onFault(const char* where, const char* what) override;
  // Any thread: resolves what drain() promised.
  void drained();

  // Keeps the process alive until the promise settles, which close() does at the latest.
  Napi::Promise promiseDrained();
  bool draining() const { return !waiting_.empty(); }
  uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }
  // After the workers ended. Delivers what is left, if JavaScript can still run.
  void finish();
  void close();

  static constexpr uint32_t kFieldsPerRecord = 19;

 private:
  static constexpr size_t kMaxRecords = 32768;
  static constexpr size_t kMaxIdentities = 4096;
  static constexpr size_t kRecordsPerTurn = 512;

  static void deliverThunk(napi_env env, napi_value function, void* self, void* data);
  void wake();
  void deliver(Napi::Env env);
  void resolveDrained();

  Napi::Env env_;
  napi_threadsafe_function wakeup_ = nullptr;
  Napi::FunctionReference on_access_, on_certificate_needed_, on_fault_;
  std::vector<Napi::Promise::Deferred> waiting_;
  std::atomic<bool> scheduled_{false}, drained_{false};
  std::atomic<uint64_t> dropped_{0};
  std::mutex mutex_;  // guards those below
  std::vector<AccessRecord> records_;
  std::set<std::string> identities_;
  uint64_t faults_ = 0;
  // In place: memory may be what was short.
  char fault_where_[32] = "", fault_what_[200] = "";
};

}  // namespace ebbtide
