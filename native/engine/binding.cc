// The addon: functions around the one engine of the process, for src/proxy/native-engine.ts. JavaScript's
// thread only, but for what binding_events.h says.
#include <napi.h>
#include <openssl/crypto.h>
#include <openssl/ssl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <exception>

#include "binding_events.h"
#include "binding_values.h"

namespace ebbtide {

namespace {

// The engine of this process, for the exit handler. Its owner is the Addon of the environment that made it.
std::atomic<Engine*> running{nullptr};

// process.exit() and an uncaught exception run exit handlers and skip environment cleanup. Worker threads
// must have ended before OpenSSL's own exit handler frees what they use; ours was registered later, so it
// runs earlier.
void stopAtExit() {
  if (Engine* engine = running.exchange(nullptr)) engine->stopNow();
}

// Everything that belongs to one JavaScript environment.
struct Addon {
  std::unique_ptr<EventBridge> events;
  std::unique_ptr<Engine> engine;
  bool started = false;

  ~Addon() { halt(); }

  void halt() {
    Engine* mine = engine.get();
    running.compare_exchange_strong(mine, nullptr);
    engine.reset();
    if (events) events->close();
  }
};

// The environment ends in order; no JavaScript may run any more.
void haltAtCleanup(void* addon) {
  static_cast<Addon*>(addon)->halt();
}

Addon& addonOf(const Napi::CallbackInfo& info) {
  return *info.Env().GetInstanceData<Addon>();
}

Engine& engineOf(const Napi::CallbackInfo& info) {
  Addon& addon = addonOf(info);
  if (!addon.engine) throw Napi::Error::New(info.Env(), "engine: not created, or stopped");
  return *addon.engine;
}

// Turns the engine's exceptions into JavaScript's; Napi::Error passes as it is.
template <void (*function)(const Napi::CallbackInfo&)>
void guarded(const Napi::CallbackInfo& info) {
  try {
    function(info);
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(info.Env(), std::string("engine: ") + error.what());
  }
}

template <Napi::Value (*function)(const Napi::CallbackInfo&)>
Napi::Value guardedValue(const Napi::CallbackInfo& info) {
  try {
    return function(info);
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(info.Env(), std::string("engine: ") + error.what());
  }
}

void create(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  EngineConfig config = readOptions(info[0]);
  const Napi::Function on_access = readFunction(info[1], {nullptr, "onAccess", 0});
  const Napi::Function on_certificate = readFunction(info[2], {nullptr, "onCertificateNeeded", 0});
  const Napi::Function on_fault = readFunction(info[3], {nullptr, "onFault", 0});
  Addon& addon = addonOf(info);
  if (addon.engine || running.load() != nullptr) {
    throw Napi::Error::New(env, "engine: this process has one already; stop it first");
  }
  // First OpenSSL's exit handler, then ours.
  OPENSSL_init_ssl(0, nullptr);
  static const bool registered = std::atexit(stopAtExit) == 0;
  if (!registered) throw Napi::Error::New(env, "engine: cannot register the exit handler");
  addon.events = std::make_unique<EventBridge>(env, on_access, on_certificate, on_fault);
  // Hooks run last come first, so this stops the workers before the event channel, which they call, is freed.
  napi_add_env_cleanup_hook(env, haltAtCleanup, &addon);
  addon.engine = std::make_unique<Engine>(std::move(config), *addon.events);
  addon.started = false;
  running.store(addon.engine.get());
}

void start(const Napi::CallbackInfo& info) {
  Engine& engine = engineOf(info);
  Addon& addon = addonOf(info);
  if (addon.started) throw Napi::Error::New(info.Env(), "engine: started already");
  engine.start();
  addon.started = true;
}

void addPod(const Napi::CallbackInfo& info) {
  LocalPod pod = readPod(info[0]);
  Addon& addon = addonOf(info);
  if (!addon.engine) {
    ::close(pod.netns_fd);  // ours from here on, whatever happens
    throw Napi::Error::New(info.Env(), "engine: not created, or stopped");
  }
  addon.engine->addPod(std::move(pod));
}

void removePod(const Napi::CallbackInfo& info) {
  const std::string uid = readText(info[0], {nullptr, "uid", 0});
  engineOf(info).removePod(uid);
}

void setCertificate(const Napi::CallbackInfo& info) {
  const std::string identity = readText(info[0], {nullptr, "identity", 0});
  const CertificateBundle bundle = readBundle(info[1]);
  engineOf(info).setCertificate(identity, bundle);
}

void removeCertificate(const Napi::CallbackInfo& info) {
  const std::string identity = readText(info[0], {nullptr, "identity", 0});
  engineOf(info).removeCertificate(identity);
}

void apply(const Napi::CallbackInfo& info) {
  StateDelta delta = readDelta(info[0]);
  engineOf(info).apply(std::move(delta));
}

Napi::Value number(Napi::Env env, uint64_t value) {
  return Napi::Number::New(env, static_cast<double>(value));
}

Napi::Value traffic(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Addon& addon = addonOf(info);
  const std::vector<TrafficSample> samples =
      addon.engine ? addon.engine->traffic() : std::vector<TrafficSample>();
  Napi::Array out = Napi::Array::New(env, samples.size());
  for (uint32_t i = 0; i < samples.size(); ++i) {
    const Napi::HandleScope scope(env);
    const TrafficSample& sample = samples[i];
    Napi::Array labels = Napi::Array::New(env, sample.labels.size());
    for (uint32_t j = 0; j < sample.labels.size(); ++j) labels.Set(j, sample.labels[j]);
    Napi::Object object = Napi::Object::New(env);
    object.Set("labels", labels);
    object.Set("opened", number(env, sample.opened));
    object.Set("closed", number(env, sample.closed));
    object.Set("failed", number(env, sample.failed));
    object.Set("receivedBytes", number(env, sample.received_bytes));
    object.Set("sentBytes", number(env, sample.sent_bytes));
    out.Set(i, object);
  }
  return out;
}

Napi::Value connections(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Addon& addon = addonOf(info);
  const std::vector<ConnectionInfo> open =
      addon.engine ? addon.engine->connections() : std::vector<ConnectionInfo>();
  Napi::Array out = Napi::Array::New(env, open.size());
  for (uint32_t i = 0; i < open.size(); ++i) {
    const Napi::HandleScope scope(env);
    const ConnectionInfo& c = open[i];
    Napi::Object object = Napi::Object::New(env);
    object.Set("inbound", c.inbound);
    object.Set("podUid", c.pod_uid);
    object.Set("source", c.source.toString());
    object.Set("destination", c.destination.toString());
    object.Set("hboneAddress", c.hbone_address);
    object.Set("protocol", c.protocol);
    object.Set("peerIdentity", c.peer_identity);
    object.Set("bytesSent", number(env, c.bytes_sent));
    object.Set("bytesReceived", number(env, c.bytes_received));
    object.Set("ageMs", number(env, c.age_ms));
    out.Set(i, object);
  }
  return out;
}

Napi::Value stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Addon& addon = addonOf(info);
  const EngineStats s = addon.engine ? addon.engine->stats() : EngineStats();
  const uint64_t dropped = addon.events ? addon.events->dropped() : 0;
  Napi::Object object = Napi::Object::New(env);
  object.Set("openConnections", number(env, s.open_connections));
  object.Set("hboneConnections", number(env, s.hbone_connections));
  object.Set("handshakes", number(env, s.handshakes));
  object.Set("handshakeFailures", number(env, s.handshake_failures));
  object.Set("bufferedBytes", number(env, s.buffered_bytes));
  object.Set("accessRecordsDropped", number(env, s.access_records_dropped + dropped));
  object.Set("faults", number(env, s.faults));
  return object;
}

Napi::Value drain(const Napi::CallbackInfo& info) {
  constexpr double max_ms = 86'400'000;
  const double deadline_ms = readNumber(info[0], {nullptr, "deadlineMs", 0}, 0, max_ms);
  Engine& engine = engineOf(info);
  EventBridge* events = addonOf(info).events.get();
  const bool first = !events->draining();
  const Napi::Promise promise = events->promiseDrained();
  // `events` outlives the engine's threads, and with them every call of this.
  if (first)
    engine.drain(std::chrono::milliseconds(static_cast<int64_t>(deadline_ms)),
                 [events] { events->drained(); });
  return promise;
}

void stopNow(const Napi::CallbackInfo& info) {
  Addon& addon = addonOf(info);
  if (!addon.engine) return;
  Engine* mine = addon.engine.get();
  running.compare_exchange_strong(mine, nullptr);
  addon.engine->stopNow();
  addon.engine.reset();
  napi_remove_env_cleanup_hook(info.Env(), haltAtCleanup, &addon);
  addon.events->finish();
  addon.events->close();
}

Napi::Value version(Napi::Env env, unsigned long major, unsigned long minor) {
  return Napi::String::New(env, std::to_string(major) + "." + std::to_string(minor));
}

Napi::Array textsOf(Napi::Env env, const std::vector<std::string>& texts) {
  Napi::Array out = Napi::Array::New(env, texts.size());
  for (uint32_t i = 0; i < texts.size(); ++i) out.Set(i, texts[i]);
  return out;
}

// Three lists by the index of Reason: names, hints, response flags.
Napi::Value reasons(Napi::Env env) {
  std::vector<std::string> names, hints, flags;
  for (uint8_t i = 0; i < static_cast<uint8_t>(Reason::kCount); ++i) {
    names.emplace_back(reasonName(static_cast<Reason>(i)));
    hints.emplace_back(reasonHint(static_cast<Reason>(i)));
    flags.emplace_back(reasonResponseFlag(static_cast<Reason>(i)));
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("names", textsOf(env, names));
  object.Set("hints", textsOf(env, hints));
  object.Set("flags", textsOf(env, flags));
  return object;
}

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  // Owned by the environment: deleted (and the engine stopped) when it ends in order, skipped by
  // process.exit().
  env.SetInstanceData(new Addon());
  const unsigned long running_version = OpenSSL_version_num();
  exports.Set("opensslCompiled", version(env, OPENSSL_VERSION_MAJOR, OPENSSL_VERSION_MINOR));
  exports.Set("opensslRunning", version(env, running_version >> 28, (running_version >> 20) & 0xff));
  exports.Set("trafficLabelNames", textsOf(env, TrafficCounters::labelNames()));
  exports.Set("fieldsPerRecord", Napi::Number::New(env, EventBridge::kFieldsPerRecord));
  exports.Set("reasons", reasons(env));
  exports.Set("create", Napi::Function::New<guarded<create>>(env, "create"));
  exports.Set("start", Napi::Function::New<guarded<start>>(env, "start"));
  exports.Set("addPod", Napi::Function::New<guarded<addPod>>(env, "addPod"));
  exports.Set("removePod", Napi::Function::New<guarded<removePod>>(env, "removePod"));
  exports.Set("setCertificate", Napi::Function::New<guarded<setCertificate>>(env, "setCertificate"));
  exports.Set("removeCertificate", Napi::Function::New<guarded<removeCertificate>>(env, "removeCertificate"));
  exports.Set("apply", Napi::Function::New<guarded<apply>>(env, "apply"));
  exports.Set("traffic", Napi::Function::New<guardedValue<traffic>>(env, "traffic"));
  exports.Set("connections", Napi::Function::New<guardedValue<connections>>(env, "connections"));
  exports.Set("stats", Napi::Function::New<guardedValue<stats>>(env, "stats"));
  exports.Set("drain", Napi::Function::New<guardedValue<drain>>(env, "drain"));
  exports.Set("stopNow", Napi::Function::New<guarded<stopNow>>(env, "stopNow"));
  return exports;
}

}  // namespace

}  // namespace ebbtide

// The macro wants a plain name in the global namespace.
static Napi::Object initialiseEngine(Napi::Env env, Napi::Object exports) {
  return ebbtide::initialise(env, exports);
}

NODE_API_MODULE(engine, initialiseEngine)
