// JavaScript values to the engine's types, as src/proxy/engine.ts declares them. Whatever has another shape
// throws a TypeError (a number out of bounds a RangeError) that names the place, before anything was changed.
#pragma once

#include <napi.h>

#include <string>

#include "engine.h"

namespace ebbtide {

// Where in the arguments a value stands, as a chain on the stack: no text is built unless something is wrong.
struct Where {
  const Where* parent = nullptr;
  const char* name = nullptr;  // null: `index` counts
  size_t index = 0;

  std::string text() const;
};

std::string readText(const Napi::Value& value, const Where& where);
// A whole number in [min, max].
double readNumber(const Napi::Value& value, const Where& where, double min, double max);
Napi::Object readObject(const Napi::Value& value, const Where& where);
Napi::Function readFunction(const Napi::Value& value, const Where& where);

EngineConfig readOptions(const Napi::Value& value);
LocalPod readPod(const Napi::Value& value);
CertificateBundle readBundle(const Napi::Value& value);
StateDelta readDelta(const Napi::Value& value);

}  // namespace ebbtide
