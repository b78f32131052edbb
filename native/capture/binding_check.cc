// Values of kernel_features.h and attached.h as JavaScript's. No logic here.
#include "binding_check.h"

#include <capture.h>

#include "attached.h"
#include "binding_errors.h"
#include "kernel_features.h"
#include "netns.h"

namespace ebbtide::capture {

namespace {

template <typename Each, typename Convert>
Napi::Array arrayOf(Napi::Env env, const std::vector<Each>& values, Convert convert) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (uint32_t i = 0; i < values.size(); i++) array.Set(i, convert(values[i]));
  return array;
}

Napi::Array numbers(Napi::Env env, const std::vector<uint32_t>& values) {
  return arrayOf(env, values, [&](uint32_t value) { return Napi::Number::New(env, value); });
}

Napi::Value features(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return arrayOf(env, tryFeatures(info[0].ToString(), info[1].ToString()), [&](const Trial& trial) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("name", trial.name);
      object.Set("errno", trial.error);
      object.Set("message", trial.message);
      object.Set("log", trial.log);
      return object;
    });
  });
}

Napi::Value cgroup(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return arrayOf(env, attachedToCgroup(info[0].ToString()), [&](const AttachedPrograms& each) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("hook", each.hook);
      object.Set("attachFlags", each.attach_flags);
      object.Set("programs", numbers(env, each.programs));
      return object;
    });
  });
}

Napi::Value links(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return arrayOf(env, bpfLinks(), [&](const BpfLink& link) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("id", link.id);
      object.Set("program", link.program);
      object.Set("kind", link.kind);
      object.Set("target", Napi::BigInt::New(env, link.target));
      object.Set("attachType", link.attach_type);
      return object;
    });
  });
}

Napi::Value program(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    BpfProgram found = bpfProgram(info[0].ToNumber().Uint32Value());
    Napi::Object object = Napi::Object::New(env);
    object.Set("id", found.id);
    object.Set("name", found.name);
    object.Set("type", found.type);
    object.Set("uid", found.uid);
    return object;
  });
}

Napi::Value ingress(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return arrayOf(env, ingressPrograms(info[0].ToNumber().Int32Value()), [&](const InterfacePrograms& each) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("interface", each.interface);
      object.Set("index", each.index);
      object.Set("how", each.how);
      object.Set("priority", each.priority);
      object.Set("program", each.program);
      return object;
    });
  });
}

Napi::Value pinned(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    PinnedObjects found = pinnedObjects(info[0].ToString());
    Napi::Object object = Napi::Object::New(env);
    object.Set("programs", numbers(env, found.programs));
    object.Set("links", numbers(env, found.links));
    return object;
  });
}

Napi::Value readFile(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::String::New(info.Env(), readInNetns(info[0].ToNumber().Int32Value(), info[1].ToString()));
  });
}

}  // namespace

void defineCheck(Napi::Env env, Napi::Object exports) {
  exports.Set("tryFeatures", Napi::Function::New(env, features));
  exports.Set("attachedToCgroup", Napi::Function::New(env, cgroup));
  exports.Set("bpfLinks", Napi::Function::New(env, links));
  exports.Set("bpfProgram", Napi::Function::New(env, program));
  exports.Set("ingressPrograms", Napi::Function::New(env, ingress));
  exports.Set("pinnedObjects", Napi::Function::New(env, pinned));
  exports.Set("readInNetns", Napi::Function::New(env, readFile));
  exports.Set("pinVersion", EBB_PIN_VERSION);
  exports.Set("targetPort", EBB_TARGET_PORT);
  exports.Set("targetPorts", EBB_TARGET_PORTS);
}

}  // namespace ebbtide::capture
