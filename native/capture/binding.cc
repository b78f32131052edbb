// What JavaScript sees of native/capture: class Capture and the functions about network namespaces. No logic
// here.
#include <napi.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "binding_check.h"
#include "binding_errors.h"
#include "error.h"
#include "netns.h"
#include "node_capture.h"
#include "pins.h"

namespace ebbtide::capture {

namespace {

std::string text(const Napi::Object& object, const char* name) {
  Napi::Value value = object.Get(name);
  if (!value.IsString()) throw Napi::TypeError::New(object.Env(), std::string(name) + " must be a string");
  return value.As<Napi::String>();
}

int integer(const Napi::Value& value, const char* name) {
  if (!value.IsNumber()) throw Napi::TypeError::New(value.Env(), std::string(name) + " must be a number");
  double number = value.As<Napi::Number>().DoubleValue();
  // Anything else would be cut to some other descriptor or process, NaN to 0.
  if (!(number >= 0 && number <= INT32_MAX) || number != static_cast<int>(number))
    throw Napi::TypeError::New(value.Env(), std::string(name) + " must be a whole number of 31 bits");
  return static_cast<int>(number);
}

PodSpec podSpec(const Napi::Value& value) {
  if (!value.IsObject()) throw Napi::TypeError::New(value.Env(), "pod must be an object");
  Napi::Object object = value.As<Napi::Object>();
  PodSpec spec;
  spec.uid = text(object, "uid");
  spec.netns_fd = integer(object.Get("netnsFd"), "netnsFd");
  spec.bypass_inbound = object.Get("bypassInbound").ToBoolean();
  Napi::Value addresses = object.Get("addresses");
  if (!addresses.IsArray()) throw Napi::TypeError::New(value.Env(), "addresses must be an array");
  Napi::Array array = addresses.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++)
    spec.addresses.push_back(parseAddress(array.Get(i).ToString()));
  return spec;
}

std::optional<HoldOptions> holdOptions(const Napi::Value& value) {
  if (value.IsUndefined()) return std::nullopt;
  if (!value.IsObject()) throw Napi::TypeError::New(value.Env(), "hold must be an object");
  Napi::Object object = value.As<Napi::Object>();
  HoldOptions options;
  std::string undecided = text(object, "undecided");
  if (undecided != "refuse" && undecided != "allow")
    throw Napi::TypeError::New(value.Env(), "hold.undecided must be 'refuse' or 'allow'");
  options.refuse = undecided == "refuse";
  if (!object.Get("podCgroup").IsUndefined()) options.directory = text(object, "podCgroup");
  return options;
}

uint32_t verdict(const Napi::Value& value) {
  std::string name = value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
  if (name == "mesh") return EBB_VERDICT_MESH;
  if (name == "plain") return EBB_VERDICT_PLAIN;
  throw Napi::TypeError::New(value.Env(), "a verdict is 'mesh' or 'plain'");
}

const char* verdictName(uint32_t value) {
  return value == EBB_VERDICT_MESH ? "mesh" : value == EBB_VERDICT_PLAIN ? "plain" : "none";
}

Napi::Array addressArray(Napi::Env env, const std::vector<Address>& addresses) {
  Napi::Array array = Napi::Array::New(env, addresses.size());
  for (uint32_t i = 0; i < addresses.size(); i++) array.Set(i, formatAddress(addresses[i]));
  return array;
}

class CaptureObject : public Napi::ObjectWrap<CaptureObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "Capture",
        {InstanceMethod<&CaptureObject::trustProxy>("trustProxy"),
         InstanceMethod<&CaptureObject::distrustProxy>("distrustProxy"),
         InstanceMethod<&CaptureObject::trustProber>("trustProber"),
         InstanceMethod<&CaptureObject::distrustProber>("distrustProber"),
         InstanceMethod<&CaptureObject::decide>("decide"), InstanceMethod<&CaptureObject::forget>("forget"),
         InstanceMethod<&CaptureObject::decided>("decided"), InstanceMethod<&CaptureObject::held>("held"),
         InstanceMethod<&CaptureObject::heldTotals>("heldTotals"),
         InstanceMethod<&CaptureObject::prepare>("prepare"),
         InstanceMethod<&CaptureObject::activate>("activate"), InstanceMethod<&CaptureObject::drain>("drain"),
         InstanceMethod<&CaptureObject::release>("release"),
         InstanceMethod<&CaptureObject::adopted>("adopted"), InstanceMethod<&CaptureObject::origin>("origin"),
         InstanceMethod<&CaptureObject::repair>("repair"),
         InstanceMethod<&CaptureObject::removeStrays>("removeStrays"),
         InstanceMethod<&CaptureObject::status>("status"), InstanceMethod<&CaptureObject::close>("close")});
  }

  explicit CaptureObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<CaptureObject>(info) {
    guarded(info.Env(), [&] {
      if (!info[0].IsObject()) throw Napi::TypeError::New(info.Env(), "options must be an object");
      Napi::Object options = info[0].As<Napi::Object>();
      GuardKind kind = options.Get("classicGuard").ToBoolean() ? GuardKind::kClassic : GuardKind::kAutomatic;
      std::string host_netns = options.Get("hostNetns").IsUndefined() ? "" : text(options, "hostNetns");
      capture_ = std::make_unique<NodeCapture>(text(options, "cgroup"), text(options, "pinDirectory"), kind,
                                               host_netns, holdOptions(options.Get("hold")));
    });
  }

 private:
  template <typename Function>
  auto with(const Napi::CallbackInfo& info, Function function) {
    return guarded(info.Env(), [&] {
      if (!capture_) throw CaptureError("this capture is closed", EBADF);
      return function(*capture_);
    });
  }

  void trustProxy(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.trustProxy(integer(info[0], "pid")); });
  }
  void distrustProxy(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.distrustProxy(integer(info[0], "pid")); });
  }
  void trustProber(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.trustProber(integer(info[0], "pid")); });
  }
  void distrustProber(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.distrustProber(integer(info[0], "pid")); });
  }
  void decide(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.hold().decide(info[0].ToString(), verdict(info[1])); });
  }
  void forget(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.hold().forget(info[0].ToString()); });
  }

  Napi::Value decided(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Napi::Array array = Napi::Array::New(info.Env());
      for (const std::string& uid : capture.hold().decided())
        array.Set(array.Length(), Napi::String::New(info.Env(), uid));
      return array;
    });
  }

  Napi::Value held(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Napi::Env env = info.Env();
      Napi::Array array = Napi::Array::New(env);
      for (const HeldPod& pod : capture.hold().newcomers()) {
        Napi::Object object = Napi::Object::New(env);
        object.Set("uid", pod.uid);
        object.Set("verdict", verdictName(pod.verdict));
        object.Set("held", pod.held);
        object.Set("ageMs", static_cast<double>(pod.age_ns) / 1e6);
        object.Set("heldMs", static_cast<double>(pod.held_ns) / 1e6);
        object.Set("refusedConnects", static_cast<double>(pod.refused_connects));
        object.Set("delayedConnects", static_cast<double>(pod.delayed_connects));
        object.Set("refusedInbound", static_cast<double>(pod.refused_inbound));
        array.Set(array.Length(), object);
      }
      return array;
    });
  }

  Napi::Value heldTotals(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      ebb_held sums = capture.hold().sums();
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("pods", static_cast<double>(sums.newcomers));
      object.Set("unseen", static_cast<double>(sums.unseen));
      object.Set("refusedConnects", static_cast<double>(sums.refused_connects));
      object.Set("delayedConnects", static_cast<double>(sums.delayed_connects));
      object.Set("refusedInbound", static_cast<double>(sums.refused_inbound));
      return object;
    });
  }

  void prepare(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.prepare(podSpec(info[0])); });
  }
  Napi::Value activate(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      std::optional<BeforeCapture> before = capture.activate(podSpec(info[0]));
      if (!before) return info.Env().Undefined();
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("sentBytes", static_cast<double>(before->sent_bytes));
      object.Set("receivedBytes", static_cast<double>(before->received_bytes));
      object.Set("inheritedConnections", static_cast<double>(before->inherited_connections));
      return object;
    });
  }
  void drain(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.drain(info[0].ToString()); });
  }
  void release(const Napi::CallbackInfo& info) {
    with(info, [&](NodeCapture& capture) { capture.release(info[0].ToString()); });
  }

  Napi::Value removeStrays(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      return Napi::Number::New(info.Env(), capture.removeStrays());
    });
  }

  Napi::Value adopted(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Napi::Env env = info.Env();
      Napi::Array array = Napi::Array::New(env);
      for (const KnownPod& pod : capture.adopted()) {
        Napi::Object object = Napi::Object::New(env);
        object.Set("uid", pod.uid);
        object.Set("cookie", Napi::BigInt::New(env, pod.cookie));
        object.Set("state", pod.captured ? "captured" : "prepared");
        object.Set("addresses", addressArray(env, pod.addresses));
        array.Set(array.Length(), object);
      }
      return array;
    });
  }

  Napi::Value origin(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Origin origin = capture.origin();
      return Napi::String::New(info.Env(), origin == Origin::kNothing     ? "nothing"
                                           : origin == Origin::kBootGuard ? "boot guard"
                                                                          : "agent");
    });
  }

  Napi::Value repair(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Repair repair = capture.repair();
      Napi::Array pods = Napi::Array::New(info.Env());
      for (const std::string& uid : repair.pods) pods.Set(pods.Length(), Napi::String::New(info.Env(), uid));
      Napi::Object object = Napi::Object::New(info.Env());
      object.Set("repinned", repair.repinned);
      object.Set("reattached", repair.reattached);
      object.Set("pods", pods);
      return object;
    });
  }

  Napi::Value status(const Napi::CallbackInfo& info) {
    return with(info, [&](NodeCapture& capture) -> Napi::Value {
      Napi::Env env = info.Env();
      Napi::Array array = Napi::Array::New(env);
      for (const PodStatus& pod : capture.status()) {
        Napi::Object listeners = Napi::Object::New(env);
        listeners.Set("outbound", pod.outbound_listeners);
        listeners.Set("hbone", pod.hbone_listeners);
        listeners.Set("plaintext", pod.plaintext_listeners);
        Napi::Object object = Napi::Object::New(env);
        object.Set("uid", pod.uid);
        object.Set("cookie", Napi::BigInt::New(env, pod.cookie));
        object.Set("outbound", pod.outbound);
        object.Set("inbound", pod.inbound);
        object.Set("guard", pod.guard);
        object.Set("listeners", listeners);
        object.Set("capturedConnections", Napi::BigInt::New(env, pod.captured_connections));
        object.Set("steeredConnections", Napi::BigInt::New(env, pod.steered_connections));
        object.Set("refusedConnections", Napi::BigInt::New(env, pod.refused_connections));
        object.Set("probeConnections", Napi::BigInt::New(env, pod.probe_connections));
        object.Set("flows", pod.flows);
        object.Set("guardDrops", Napi::BigInt::New(env, pod.guard_drops));
        object.Set("inheritedConnections", pod.inherited_connections);
        object.Set("lastCaptureNs", Napi::BigInt::New(env, pod.last_capture_ns));
        array.Set(array.Length(), object);
      }
      return array;
    });
  }

  void close(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      if (!capture_) return;
      if (info[0].ToBoolean()) capture_->removeAll();
      capture_.reset();
    });
  }

  std::unique_ptr<NodeCapture> capture_;
};

Napi::Value openNetnsPath(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::Number::New(info.Env(), openNetns(info[0].ToString()).release());
  });
}

Napi::Value netnsAddressList(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return addressArray(info.Env(), netnsAddresses(integer(info[0], "fd")));
  });
}

Napi::Value netnsInodeNumber(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::BigInt::New(info.Env(), netnsInode(integer(info[0], "fd")));
  });
}

Napi::Value netnsCookieNumber(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::BigInt::New(info.Env(), netnsCookie(integer(info[0], "fd")));
  });
}

void closeDescriptor(const Napi::CallbackInfo& info) {
  guarded(info.Env(), [&] {
    if (::close(integer(info[0], "fd"))) throw CaptureError("closing a descriptor", errno);
  });
}

Napi::Value removeAllPins(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    std::string directory = info[0].ToString();
    if (!exists(directory)) return Napi::Number::New(info.Env(), 0);
    // An agent that runs would make them again.
    Fd lock = lockPins(directory);
    return Napi::Number::New(info.Env(), removePins(directory));
  });
}

// In the network namespace of this process.
Napi::Value removeGuardStrays(const Napi::CallbackInfo& info) {
  return guarded(info.Env(),
                 [&]() -> Napi::Value { return Napi::Number::New(info.Env(), removeStrayGuards(nullptr)); });
}

}  // namespace

static Napi::Object defineExports(Napi::Env env, Napi::Object exports) {
  exports.Set("Capture", CaptureObject::define(env));
  exports.Set("openNetns", Napi::Function::New(env, openNetnsPath));
  exports.Set("netnsAddresses", Napi::Function::New(env, netnsAddressList));
  exports.Set("netnsInode", Napi::Function::New(env, netnsInodeNumber));
  exports.Set("netnsCookie", Napi::Function::New(env, netnsCookieNumber));
  exports.Set("closeFd", Napi::Function::New(env, closeDescriptor));
  exports.Set("removePins", Napi::Function::New(env, removeAllPins));
  exports.Set("removeStrayGuards", Napi::Function::New(env, removeGuardStrays));
  defineCheck(env, exports);
  return exports;
}

}  // namespace ebbtide::capture

// Node's macro makes a name of this name, so it must not be qualified.
static Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  return ebbtide::capture::defineExports(env, exports);
}
NODE_API_MODULE(capture, initialize)
