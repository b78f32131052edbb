// One wake-up for many records: five thousand connections a second end as a few hundred calls into
// JavaScript.
#include "binding_events.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace ebbtide {

namespace {

napi_value textValue(napi_env env, const std::string& text) {
  napi_value value = nullptr;
  napi_create_string_utf8(env, text.data(), text.size(), &value);
  return value;
}

napi_value numberValue(napi_env env, double number) {
  napi_value value = nullptr;
  napi_create_double(env, number, &value);
  return value;
}

// Appends to an array through the C interface: no reference, exception check or wrapper for each of the
// values.
class Row {
 public:
  Row(napi_env env, napi_value array, uint32_t at) : env_(env), array_(array), at_(at) {}
  void text(const std::string& text) { put(textValue(env_, text)); }
  void number(double number) { put(numberValue(env_, number)); }
  void workload(const Workload* w) {
    if (w == nullptr) {
      at_ += 3;  // holes read as undefined
      return;
    }
    text(w->name);
    text(w->ns);
    text(w->cluster_id);
  }

 private:
  void put(napi_value value) { napi_set_element(env_, array_, at_++, value); }
  napi_env env_;
  napi_value array_;
  uint32_t at_;
};

// Fields in the order that src/proxy/native-engine.ts reads them.
void writeRecord(napi_env env, napi_value array, uint32_t at, const AccessRecord& r) {
  Row row(env, array, at);
  row.number((r.inbound ? 1 : 0) + (r.established ? 2 : 0));
  row.number(static_cast<double>(r.reason));
  row.text(r.detail);
  row.text(r.source.toString());
  row.text(r.destination.toString());
  row.text(r.hbone_address);
  row.workload(r.source_workload.get());
  row.workload(r.destination_workload.get());
  row.text(r.service ? r.service->hostname : std::string());
  row.text(r.source_identity);
  row.text(r.destination_identity);
  row.number(static_cast<double>(r.bytes_sent));
  row.number(static_cast<double>(r.bytes_received));
  row.number(static_cast<double>(r.duration_us) / 1000.0);
  row.text(r.trace_id);
}

// An exception of the listener is the process's to handle, as if thrown from a timer.
void call(Napi::Env env, const Napi::FunctionReference& function, const std::vector<napi_value>& arguments) {
  try {
    function.Call(arguments);
  } catch (const Napi::Error& error) {
    napi_fatal_exception(env, error.Value());
  }
}

}  // namespace

EventBridge::EventBridge(Napi::Env env, Napi::Function on_access, Napi::Function on_certificate_needed,
                         Napi::Function on_fault)
    : env_(env),
      on_access_(Napi::Persistent(on_access)),
      on_certificate_needed_(Napi::Persistent(on_certificate_needed)),
      on_fault_(Napi::Persistent(on_fault)) {
  const napi_value name = Napi::String::New(env, "ebbtide:engine");
  const napi_status status = napi_create_threadsafe_function(
      env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, &EventBridge::deliverThunk, &wakeup_);
  if (status != napi_ok) throw Napi::Error::New(env, "engine: cannot create the event channel");
  // Reports alone do not keep a process alive that has nothing else to do.
  napi_unref_threadsafe_function(env, wakeup_);
}

void EventBridge::onAccess(std::vector<AccessRecord> records) {
  {
    const std::lock_guard lock(mutex_);
    const size_t room = kMaxRecords - std::min(kMaxRecords, records_.size());
    const size_t taken = std::min(room, records.size());
    dropped_.fetch_add(records.size() - taken, std::memory_order_relaxed);
    records_.insert(records_.end(), std::make_move_iterator(records.begin()),
                    std::make_move_iterator(records.begin() + static_cast<ptrdiff_t>(taken)));
  }
  wake();
}

void EventBridge::onCertificateNeeded(const std::string& identity) {
  {
    const std::lock_guard lock(mutex_);
    // Past the bound the connection's own wait times out; asking repeats with the next connection.
    if (identities_.size() < kMaxIdentities) identities_.insert(identity);
  }
  wake();
}

void EventBridge::onFault(const char* where, const char* what) {
  {
    const std::lock_guard lock(mutex_);
    if (faults_++ == 0) {
      snprintf(fault_where_, sizeof fault_where_, "%s", where);
      snprintf(fault_what_, sizeof fault_what_, "%s", what);
    }
  }
  wake();
}

void EventBridge::drained() {
  drained_.store(true);
  wake();
}

void EventBridge::wake() {
  if (!scheduled_.exchange(true)) napi_call_threadsafe_function(wakeup_, nullptr, napi_tsfn_nonblocking);
}

void EventBridge::deliverThunk(napi_env env, napi_value, void* self, void*) {
  // No environment: it is being torn down, and nobody is left to tell.
  if (env != nullptr) static_cast<EventBridge*>(self)->deliver(Napi::Env(env));
}

void EventBridge::deliver(Napi::Env env) {
  const Napi::HandleScope scope(env);
  scheduled_.store(false);
  std::vector<AccessRecord> records;
  std::set<std::string> identities;
  bool more = false;
  uint64_t faults = 0;
  std::string where, what;
  {
    const std::lock_guard lock(mutex_);
    if (faults_ > 0) {
      where = fault_where_;
      what = fault_what_;
      faults = std::exchange(faults_, 0);
    }
    identities.swap(identities_);
    if (records_.size() <= kRecordsPerTurn) {
      records.swap(records_);
    } else {
      const auto end = records_.begin() + static_cast<ptrdiff_t>(kRecordsPerTurn);
      records.assign(std::make_move_iterator(records_.begin()), std::make_move_iterator(end));
      records_.erase(records_.begin(), end);
      more = true;
    }
  }
  if (more && wakeup_ != nullptr) wake();  // the rest after other events had their turn
  for (const std::string& identity : identities)
    call(env, on_certificate_needed_, {textValue(env, identity)});
  if (faults > 0) {
    call(env, on_fault_,
         {textValue(env, where), textValue(env, what), Napi::Number::New(env, static_cast<double>(faults))});
  }
  if (!records.empty()) {
    napi_value array = nullptr;
    napi_create_array_with_length(env, records.size() * kFieldsPerRecord, &array);
    for (size_t i = 0; i < records.size(); ++i) {
      const Napi::HandleScope record_scope(env);
      writeRecord(env, array, static_cast<uint32_t>(i) * kFieldsPerRecord, records[i]);
    }
    call(env, on_access_, {array});
  }
  if (drained_.exchange(false)) resolveDrained();
}

Napi::Promise EventBridge::promiseDrained() {
  if (waiting_.empty()) napi_ref_threadsafe_function(env_, wakeup_);
  waiting_.push_back(Napi::Promise::Deferred::New(env_));
  return waiting_.back().Promise();
}

void EventBridge::resolveDrained() {
  if (waiting_.empty()) return;
  if (wakeup_ != nullptr) napi_unref_threadsafe_function(env_, wakeup_);
  for (const auto& deferred : std::exchange(waiting_, {})) deferred.Resolve(env_.Undefined());
}

void EventBridge::finish() {
  const Napi::HandleScope scope(env_);
  for (bool left = true; left;) {
    deliver(env_);
    const std::lock_guard lock(mutex_);
    left = !records_.empty();
  }
  resolveDrained();
}

void EventBridge::close() {
  if (wakeup_ == nullptr) return;
  napi_release_threadsafe_function(wakeup_, napi_tsfn_abort);
  wakeup_ = nullptr;
}

}  // namespace ebbtide
